"""Parts of a model, each read separately from its files: consecutive layers, the embedding, or the head.

A block is a model of the same Hugging Face class with fewer layers, filled by Transformers' own loader from only the
tensors of those layers, so families whose tensors are renamed or merged on loading work too. It takes hidden states
[b, T, hidden] instead of tokens and returns those after its last layer. No modelling file is edited.
"""

from __future__ import annotations

import copy
import mmap
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.utils import logging

from trenchcoat.config import ModelConfig, UserError
from trenchcoat.config.errors import refusals
from trenchcoat.models import loading
from trenchcoat.models.basefolder import LOAD_ERRORS, base_config, base_folder, reason
from trenchcoat.models.families import attention_sites, decoder_of
from trenchcoat.models.identity import file_fingerprint
from trenchcoat.models.shapes import meta_model
from trenchcoat.models.transformers_internals import attention_name
from trenchcoat.runtime import files
from trenchcoat.runtime.sealed import read_sealed, write_sealed
from trenchcoat.runtime.sharding import first_elements
from trenchcoat.runtime.weightfiles import SINGLE, tensor_files

BLOCK_FILE = "trenchcoat_block.json"
"""File next to the tensors of a block copied by ``blocks shard``: which layers of which model they are."""

_LAYER = re.compile(r"(?<![^.])layers\.(\d+)\.")
_EMBEDDING_SCALES = ("embedding_multiplier",)
"""Decoder attributes that scale the embeddings, and would also scale hidden states passed in their place."""

Tensors = dict[str, Tensor]


class BlockSource:
    """The files of a model, from which any range of layers can be built separately.

    ``folder`` overrides their location (a folder made by ``blocks shard``). Raises ``UserError`` for a model without
    safetensors files, a family that cannot be linearized, and 4-bit bases.
    """

    def __init__(self, cfg: ModelConfig, folder: Path | None = None) -> None:
        self.cfg = cfg
        self.folder = base_folder(loading.model_source(cfg), cfg.revision) if folder is None else folder
        self.device = loading.resolve_device(cfg.device)
        self.dtype = loading.resolve_dtype(cfg.dtype, self.device)
        self.config = base_config(cfg, self.folder)
        self._class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self.config), None)
        if self._class is None:
            raise UserError(f"model.path={cfg.path!r} ({self.config.model_type}) is not a causal language model")
        self._files = tensor_files(self.folder)
        part = self.folder / BLOCK_FILE
        self.part: dict[str, Any] | None = _block_record(part) if part.is_file() else None

    @cached_property
    def plain(self) -> Any:
        """The whole model on the meta device."""
        model = meta_model(self.config)
        attention_sites(model)  # raises for an unsupported family
        return model

    @cached_property
    def attention(self) -> str:
        """Name of the layers' attention implementation, as the whole model would choose it."""
        asked = None if self.cfg.attention == "auto" else self.cfg.attention
        what = f"cannot build layers of model.path={self.cfg.path!r}"
        with refusals(lambda error: f"{what}: {reason(error)}", LOAD_ERRORS), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self._config(0, 0), attn_implementation=asked)
        return str(attention_name(model.config))

    @property
    def layers(self) -> int:
        """Layers of the whole model."""
        return int(self.config.num_hidden_layers)

    @property
    def groups(self) -> int:
        """Key/value heads of a layer."""
        return int(self.config.num_key_value_heads)

    @property
    def hidden(self) -> int:
        """Entries of a hidden state."""
        return int(self.config.hidden_size)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the whole base model, equal to :func:`trenchcoat.models.identity.fingerprint` once loaded."""
        if self.part is not None:
            return str(self.part["base_fingerprint"])
        return file_fingerprint(self.plain, self.folder, self._first_elements_when_loaded)

    def _first_elements_when_loaded(self, name: str, count: int) -> Tensor:
        """First elements of a parameter that is stored under other names in the files."""
        found = _LAYER.search(name)
        if found is None:
            raise UserError(f"{self.folder} has no tensor {name!r}; the model is incomplete")
        index = int(found.group(1))
        block = self.build(index, index + 1, self.read(index, index + 1))
        return first_elements(dict(block.named_parameters())[_moved(name, -index)], count)

    def layer_bytes(self, first: int, stop: int) -> int:
        """Bytes of the layers [first, stop) in the model's dtype."""
        names = [(name, p) for name, p in self.plain.named_parameters() if _layer_in(name, first, stop)]
        return sum(p.numel() for _, p in names) * self.dtype.itemsize

    def files(self) -> list[Path]:
        """The files that hold weights."""
        return sorted(set(self._files.values()))

    # Reading

    def read(self, first: int, stop: int) -> Tensors:
        """The stored tensors of layers [first, stop), numbered from 0, copied to host memory."""
        if not 0 <= first < stop <= self.layers:
            raise ValueError(f"layers [{first}, {stop}) of {self.layers}")
        names = [name for name in self._files if _layer_in(name, first, stop)]
        if not names:
            raise UserError(f"{self.folder} has no tensors of layers {first} to {stop - 1}")
        return {_moved(name, -first): tensor for name, tensor in self._load(names)}

    def _load(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:  # reopened for each tensor, so that read pages do not stay mapped
            try:
                with safe_open(str(self._files[name]), framework="pt") as opened:
                    yield name, _own_memory(opened.get_tensor(name))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{self._files[name]} cannot be read ({error}); check the disk and run the same command again"
                ) from error

    # Building

    def build(self, first: int, stop: int, tensors: Tensors) -> Any:
        """The layers [first, stop) as a model that takes ``inputs_embeds`` [b, T, hidden]; frozen, on the device.

        ``tensors`` (from :meth:`read`) become its weights. Its layers keep their indices in the whole model.
        """
        model = self._filled(self._config(first, stop, vocabulary=1), tensors)
        model.set_output_embeddings(nn.Identity())
        decoder = decoder_of(model)
        for name, child in list(decoder.named_children()):
            if name != "layers" and next(child.parameters(), None) is not None:
                setattr(decoder, name, nn.Identity())
        _unscale(decoder)
        for module in decoder.layers.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx += first
        return model.to(self.device)

    def embedding(self) -> Any:
        """The model without layers, on the host; its ``last_hidden_state`` is the input of the first layer."""
        name = _name_of(self.plain, self.plain.get_input_embeddings().weight)
        model = self._filled(self._config(0, 0), dict(self._load([name])))
        decoder = decoder_of(model)
        for child_name, child in list(decoder.named_children()):
            if child_name != "layers" and not isinstance(child, nn.Embedding):
                has_weights = next(child.parameters(), None) is not None
                setattr(decoder, child_name, nn.Identity() if has_weights else child)
        return model

    def head(self) -> Any:
        """The model without layers, for hidden states after the last one: its final norm and head."""
        plain = self.plain
        embedding = _name_of(plain, plain.get_input_embeddings().weight)
        head = plain.get_output_embeddings().weight
        shared = head is plain.get_input_embeddings().weight
        source = embedding if shared or (name := _name_of(plain, head)) not in self._files else name
        others = [name for name in self._files if not _LAYER.search(name) and name not in (embedding, source)]
        tensors = dict(self._load([source, *others]))
        model = self._filled(self._config(0, 0), {**tensors, embedding: tensors.pop(source)})
        _unscale(decoder_of(model))
        return model.to(self.device)

    def _config(self, first: int, stop: int, vocabulary: int | None = None) -> Any:
        """The config of layers [first, stop); lists with one entry per layer are sliced too."""
        config = copy.deepcopy(self.config)
        for name, value in vars(self.config).items():
            if isinstance(value, list | tuple) and len(value) == self.layers and name != "architectures":
                setattr(config, name, type(value)(value[first:stop]))
        config.num_hidden_layers = stop - first
        config.tie_word_embeddings = True
        if vocabulary is not None:
            config.vocab_size = vocabulary
            config.pad_token_id = config.bos_token_id = config.eos_token_id = None
        return config

    def _filled(self, config: Any, tensors: Mapping[str, Tensor]) -> Any:
        attention = None if self.cfg.attention == "auto" else self.cfg.attention
        with _quiet(), torch.random.fork_rng(devices=[]):  # missing weights are initialised at random, then dropped
            try:
                model, found = self._class.from_pretrained(
                    None,
                    config=config,
                    state_dict=dict(tensors),
                    dtype=self.dtype,
                    attn_implementation=attention,
                    output_loading_info=True,
                )
            except LOAD_ERRORS as error:
                raise UserError(f"cannot build layers of model.path={self.cfg.path!r}: {reason(error)}") from error
        missing = sorted(name for name in found["missing_keys"] if _LAYER.search(name))
        if missing or found["mismatched_keys"]:
            wrong = missing or sorted(str(one) for one in found["mismatched_keys"])
            raise UserError(
                f"{self.folder} does not contain {wrong[0]} as the model expects it; it is incomplete or damaged"
            )
        return model.eval().requires_grad_(False)

    # Copying

    def copy_block(self, first: int, stop: int, out: Path, tokenizer: Any = None) -> None:
        """Copy the tensors of layers [first, stop), the config and the base fingerprint to a folder.

        The folder can be used instead of the model for this block.
        """
        tensors = dict(self._load([name for name in self._files if _layer_in(name, first, stop)]))
        with files.atomic_directory(out) as partial:
            files.save_tensors(partial / SINGLE, tensors, {"format": "pt"})
            self.config.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            record = {"first": first, "stop": stop, "layers": self.layers, "base_fingerprint": self.fingerprint}
            write_sealed(partial / BLOCK_FILE, {**record, "sha256": files.sha256(partial / SINGLE)})


def _block_record(path: Path) -> dict[str, Any]:
    """The content of a block's file, after a check of the tensors beside it; ``CorruptFileError``."""
    fix = "write the folder again with `blocks shard`"
    record = read_sealed(path, fix)
    if files.sha256(path.parent / SINGLE) != record["sha256"]:
        raise files.CorruptFileError(f"{path.parent / SINGLE} is not what {path.name} belongs to; {fix}")
    return record


class ReadAhead:
    """Reads the tensors of one block while another is trained."""

    def __init__(self, source: BlockSource) -> None:
        self.source = source
        self._thread = ThreadPoolExecutor(1, "trenchcoat-weights")
        self._next: tuple[tuple[int, int], Future[Tensors]] | None = None

    def start(self, first: int, stop: int) -> None:
        """Start reading layers [first, stop)."""
        if self._next is None or self._next[0] != (first, stop):
            self._next = (first, stop), self._thread.submit(self.source.read, first, stop)

    def block(self, first: int, stop: int) -> Any:
        """The model of layers [first, stop), from the prefetched tensors if these layers were prefetched."""
        self.start(first, stop)
        assert self._next is not None
        (_, reading), self._next = self._next, None
        return self.source.build(first, stop, reading.result())

    def close(self) -> None:
        """Wait for pending reads and drop them."""
        self._thread.shutdown(cancel_futures=True)
        self._next = None


def global_names(tensors: Mapping[str, Tensor], first: int) -> Tensors:
    """Rename the tensors of a block that starts at layer ``first`` to their names in the whole model."""
    return {_moved(name, first): tensor for name, tensor in tensors.items()}


def local_names(tensors: Mapping[str, Tensor], first: int, stop: int) -> Tensors:
    """The whole model's tensors that belong to layers [first, stop), with layers renumbered from 0."""
    return {_moved(name, -first): tensor for name, tensor in tensors.items() if _layer_in(name, first, stop)}


def _layer_in(name: str, first: int, stop: int) -> bool:
    found = _LAYER.search(name)
    return found is not None and first <= int(found.group(1)) < stop


def _moved(name: str, by: int) -> str:
    return _LAYER.sub(lambda found: f"layers.{int(found.group(1)) + by}.", name, count=1)


def _name_of(model: nn.Module, wanted: Tensor) -> str:
    return next(name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is wanted)


def _unscale(decoder: Any) -> None:
    for name in _EMBEDDING_SCALES:
        if hasattr(decoder, name):
            setattr(decoder, name, 1.0)


def _own_memory(tensor: Tensor) -> Tensor:
    """A copy in its own memory mapping, which is returned to the system with the tensor (the heap would keep it)."""
    if not tensor.numel():
        return tensor.clone()
    pages = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # matrix products over small pages are slow
        pages.madvise(mmap.MADV_HUGEPAGE)
    copy_ = torch.frombuffer(pages, dtype=torch.uint8)
    # by numpy: torch would start an OpenMP team for this thread, and with more threads than cores all of them sleep
    np.copyto(copy_.numpy(), tensor.contiguous().view(torch.uint8).flatten().numpy())
    return copy_.view(tensor.dtype).view(tensor.shape)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the loader's warnings about tensors that a block does not have by design."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
