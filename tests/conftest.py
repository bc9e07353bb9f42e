"""Fixtures for every test file: tiny random models with a tokenizer, small texts, quiet threads. No download."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch

if not torch.cuda.is_available():
    # before anything (transformers does) imports triton: its kernels then run in its interpreter, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["in_vllm/*"]
"""What needs vLLM runs in an environment of its own: `make test-vllm`."""

REPOSITORY = Path(__file__).parents[1]
SENTENCES = [
    "The coat is long and the pockets are deep.",
    "Three small models stand in one trenchcoat and speak as one.",
    "A window looks at what is near; a sum remembers what is far.",
    "Numbers are kept as they are: 0, 1, 2, 3, 5, 8, 13, 21.",
    "def fold(keys, values): return sum(k * v for k, v in zip(keys, values))",
]

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def script_module(name: str) -> Any:
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 256 bytes and three special tokens."""
    specials = ["<bos>", "<eos>", "<pad>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=512
    )


def tiny_llama_config(**changes: object) -> LlamaConfig:
    """Two layers, 4 query and 2 key/value heads of 8."""
    settings: dict[str, object] = {
        "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": True, "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama and its tokenizer, in Hugging Face format. Read only."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"), seed=0)


@pytest.fixture(scope="session")
def other_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape as ``tiny_model_dir`` with other weights. Read only."""
    return save_tiny_model(tmp_path_factory.mktemp("other-llama"), seed=1)


def save_tiny_model(folder: Path, *, seed: int, **changes: object) -> Path:
    """Write a tiny random Llama and the byte tokenizer into ``folder``; returns it."""
    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_llama_config(**changes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``.jsonl`` file of 60 short texts with a "text" column. Read only."""
    path = tmp_path_factory.mktemp("text") / "train.jsonl"
    rows = [{"text": " ".join(SENTENCES[(i + j) % len(SENTENCES)] for j in range(4))} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the benchmarks with synthetic questions. Read only."""
    from tasks_kit import write_task_files

    return write_task_files(tmp_path_factory.mktemp("data"))


@pytest.fixture
def tiny_overrides(tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that turn any recipe into a run of seconds on the tiny model; its pictures are coarse."""
    from trenchcoat.evaluation.report.plots import LOOK

    monkeypatch.setitem(LOOK, "savefig.dpi", 40)
    return [
        f"model.path={tiny_model_dir}", "model.device=cpu", f"data.path={text_file}", "data.format=text",
        "data.seq_len=48", "data.validation_rows=10", f"data.cache_dir={tmp_path / 'cache'}",
        "student.window=8", "student.feature_map.feature_dim=8", "student.keep=none", "student.sinks=0",
        "transfer.max_steps=4", "transfer.batch_size=2", "transfer.accumulation=1", "transfer.eval_every=2",
        "transfer.save_every=2", "transfer.eval_batches=2", "transfer.warmup_steps=0",
        "lora.max_steps=4", "lora.batch_size=2", "lora.accumulation=1", "lora.eval_every=2", "lora.save_every=2",
        "lora.eval_batches=2", "lora.rank=2", "lora.warmup_steps=0",
        "eval.rows=4", "eval.batch_size=2", "eval.seq_len=null", "eval.length_factors=[1]",
        "eval.copy_rows=2", "eval.decode_lengths=[16]", "eval.baselines=true", "eval.constant=false",
        "run.progress=plain", f"run.dir={tmp_path / 'run'}",
    ]  # fmt: skip


def with_student(name: str, overrides: list[str]) -> list[str]:
    """The overrides for another student, without those that it does not use."""
    from trenchcoat.config.registries import unused_settings

    unused = tuple(f"student.{each}" for each in unused_settings(name))
    return [*(one for one in overrides if not one.startswith(unused)), f"student.name={name}"]


@contextmanager
def small_file_system(folder: Path, size: str) -> Iterator[Path]:
    """A real file system of ``size`` (as mount takes it) at ``folder``, which is created; skips where not possible."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small file system needs privileges")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def trenchcoat_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``trenchcoat ARGUMENTS`` in a separate process, as a user does."""

    def run(*arguments: object, timeout: float = 120, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        command = [sys.executable, "-m", "trenchcoat", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=environment)

    return run
