"""The teacher's logits of the training and validation rows of stage 2, on disk: written in one pass, read in batches.

``lora.teacher_logits`` is a folder with the folders ``train`` and ``validation``, in the format of
:mod:`trenchcoat.conversion.blocks.hidden`: resumable shards with checksums, and a manifest with the identity of model
and text. Rows are numbered in the order in which training first uses them, so a stage with few steps stores few rows,
and one with more steps continues.

Shapes: b rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trenchcoat.config import LoraConfig
from trenchcoat.conversion.blocks.hidden import HiddenFiles, HiddenShape
from trenchcoat.data.batches import Batch, Batches
from trenchcoat.models.embedded import Split
from trenchcoat.models.stage2 import as_teacher
from trenchcoat.runtime import distributed
from trenchcoat.runtime.head import VocabularyHead, run_to_head
from trenchcoat.runtime.runlog import RunLog
from trenchcoat.runtime.sharding import compute_device
from trenchcoat.training.logits import forward_inputs
from trenchcoat.training.schedules import evaluation_batches, training_length
from trenchcoat.training.stored import TAUGHT, packed_logits, token_bytes

SHARD_BYTES = 32 << 20
"""Size of a file, about."""


class TaughtBatches:
    """The batches of a stage with the teacher's logits; everything else is that of ``batches``."""

    def __init__(self, batches: Batches, folder: Path, model: Any, base: str, log: RunLog) -> None:
        self.batches, self.log = batches, log
        order = [row for index in range(len(batches)) for row in batches.train_rows(index)][: batches.rows("train")]
        self.rows: dict[Split, list[int]] = {"train": order, "validation": list(range(batches.rows("validation")))}
        self.places = {split: {row: place for place, row in enumerate(rows)} for split, rows in self.rows.items()}
        self.stores = {split: self._store(folder / split, split, model, base) for split in self.rows}

    def _store(self, folder: Path, split: Split, model: Any, base: str) -> HiddenFiles:
        identity = {"model": base, "text": self.batches.fingerprint, "split": split, "seed": self.batches.seed}
        tokens = self.batches.rows_batch(split, [0])["input_ids"].shape[1]
        width = token_bytes(model.get_output_embeddings().weight.shape[0])
        shape = HiddenShape(len(self.rows[split]), tokens, width, torch.uint8)
        return HiddenFiles(
            folder, shape, identity, shard_bytes=SHARD_BYTES, warn=self.log.warning,
            writer=distributed.rank(), writers=distributed.size(),
        )  # fmt: skip

    def fill(self, model: Any, cfg: LoraConfig) -> None:
        """Compute what the stage reads and the folder lacks, in one pass of the teacher; a collective."""
        trained = training_length(cfg, len(self.batches))[0] * cfg.batch_size
        validated = evaluation_batches(cfg, self.batches.validation_batches()) * cfg.batch_size
        for split, needed in (("train", trained), ("validation", validated)):
            self._fill(split, needed, model, cfg.batch_size)  # type: ignore[arg-type]

    def _fill(self, split: Split, needed: int, model: Any, size: int) -> None:
        store = self.stores[split]
        whole = -(-needed // store.shard_rows) * store.shard_rows  # a file is kept once it is complete
        missing = [place for place in store.missing() if place < whole]
        groups = [missing[start : start + size] for start in range(0, len(missing), size)]
        rounds = round(distributed.largest(len(groups)))
        if rounds:
            self.log.info(f"the teacher's logits of {split} rows: {rounds} passes of {size} rows, to {store.folder}")
        for index in range(rounds):
            places = groups[index] if index < len(groups) else [0]
            batch = self.batches.rows_batch(split, [self.rows[split][place] for place in places])
            packed = self._teach(model, batch)
            if index < len(groups):
                store.write(places, packed)
        store.finish()
        distributed.barrier()
        store.refresh()

    def _teach(self, model: Any, batch: Batch) -> torch.Tensor:
        device = compute_device(model)
        with torch.no_grad(), as_teacher(model):
            inputs = forward_inputs({name: tensor.to(device) for name, tensor in batch.items()})
            hidden_bTd, _ = run_to_head(model, **inputs)
            return packed_logits(VocabularyHead(model), hidden_bTd)

    # What `fit` reads

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def train_batch(self, index: int) -> Batch:
        """Training batch ``index``, with the logits of its rows."""
        return self._with_logits(self.batches.train_batch(index), "train", self.batches.train_rows(index))

    def validation_batches(self) -> int:
        """Validation batches."""
        return self.batches.validation_batches()

    def validation_batch(self, index: int) -> Batch:
        """Validation batch ``index``, with the logits of its rows."""
        batch, size = self.batches.validation_batch(index), self.batches.batch_size
        rows = range(index * size, index * size + len(batch["input_ids"]))
        return self._with_logits(batch, "validation", rows)

    def _with_logits(self, batch: Batch, split: Split, rows: Sequence[int]) -> Batch:
        places = [self.places[split][row] for row in rows]
        return {**batch, TAUGHT: self.stores[split].read(places)}

    def close(self) -> None:
        """Close the files."""
        for store in self.stores.values():
            store.close()
