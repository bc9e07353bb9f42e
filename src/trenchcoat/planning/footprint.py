"""Peak memory of one process in a training step, by part, computed from sizes alone.

The calculation goes through the moments of a step (a layer gathered in the forward pass, the loss over the vocabulary,
a layer recomputed in the backward pass, ...) and keeps the largest. It agrees with :mod:`trenchcoat.planning.simulate`,
which runs the same step on fake tensors; `docs/PLAN.md` compares the two. Not included: the CUDA context, NCCL buffers
and allocator fragmentation (`plan` adds a reserve for them).

Held throughout the step: this process's shard of the frozen base; unsharded students and LoRA in float32, with the
gradients of the trained ones; AdamW's moments and, with several processes, the optimizer's copies of parameters and
gradients: these are sharded, so each process holds its share.

FSDP2 holds three layers at the peak of a gather in the forward pass (the gathered buffer of the previous layer, kept
until the next copy is done, its own, and the copy that the layer computes with) and two in the backward
pass. Notation: n tokens of the micro-batch, h hidden size, H query and G key/value heads of dim D, F features, K key
maps, I columns of the MLP, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from trenchcoat.config import LoraConfig, StageConfig, StudentConfig, TransferConfig
from trenchcoat.config.keep import kept_total
from trenchcoat.models.flops import kept_layers, layer_student, student_parameters, trained_parameters
from trenchcoat.models.shapes import Shapes
from trenchcoat.ops.chunked import closed_form
from trenchcoat.ops.chunked.layout import TILE_TOKENS
from trenchcoat.runtime.head import PIECE_ELEMENTS
from trenchcoat.students import StudentAttention

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a 4-bit weight: one 8-bit constant for 64 weights, one 32-bit constant for 256 constants (QLoRA,
arXiv 2305.14314)."""
MOMENTS, MASTER_COPY = 8, 8
"""Bytes per trained parameter: AdamW's two moments; with several processes, its parameter and gradient copies."""

MEMORY_PARTS = ("weights", "gathered layers", "students", "LoRA", "gradients", "optimizer", "activations", "logits")
"""Names of the parts, in table order."""


@dataclass(frozen=True)
class StepSizes:
    """Sizes of one process's micro-batch that its memory depends on."""

    shapes: Shapes
    student: StudentConfig
    stage: TransferConfig | LoraConfig
    seq_len: int
    dtype_bytes: int = 2
    """Bytes of a base weight, and of an activation in the base's precision."""

    @property
    def tokens(self) -> int:
        """n: tokens of the micro-batch that are differentiated at once."""
        pieces = self.stage.piece_len if isinstance(self.stage, LoraConfig) else None
        return self.stage.batch_size * min(self.seq_len, pieces or self.seq_len)

    @property
    def row_tokens(self) -> int:
        """Tokens of the micro-batch, in rows read whole or in pieces."""
        return self.stage.batch_size * self.seq_len

    @property
    def carried(self) -> float:
        """Bytes that the next piece reads: states and kept keys and values; 0 for rows read whole."""
        if self.tokens == self.row_tokens:
            return 0.0
        state = sum(state_bytes(self.shapes, self.student, self.dtype_bytes))
        kept = kept_bytes_per_token(self.shapes, self.student, self.dtype_bytes)
        return self.stage.batch_size * state + self.row_tokens * kept


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the frozen base is distributed over the processes."""

    ranks: int = 1
    shared_by: int = 1
    """Processes that share one copy of the base (FSDP2); 1: a full copy on each."""
    offload: bool = False
    """Shards are kept in host memory."""
    nf4: bool = False
    """Linear layers of the base in 4 bits."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process at its peak."""

    parts: dict[str, float]
    moment: str
    """Name of the peak moment."""
    host: float = 0.0
    """Bytes in host memory for this process (offloaded shards)."""

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(self.parts.values())


def footprint(step: StepSizes, layout: Layout) -> Footprint:
    """Memory of ``step`` on one process.

    Raises ``ValueError`` for a student that does not fit the model, ``UserError`` for unknown LoRA targets.
    """
    shapes, stage = step.shapes, step.stage
    maps = student_parameters(shapes, step.student)
    base = base_bytes(shapes, step.dtype_bytes, nf4=layout.nf4) / layout.shared_by
    adapters, trained = 0, maps
    if isinstance(stage, LoraConfig):
        adapters, trained = shapes.lora_parameters(stage), trained_parameters(shapes, step.student, stage)
        if stage.train == "all":  # what is trained and computed with is in float32; the base is kept
            base, step = base + 4.0 * shapes.parameters, replace(step, dtype_bytes=4)
    held = {
        "weights": 0.0 if layout.offload else base,
        "students": 4.0 * maps,
        "LoRA": 4.0 * adapters,
        "gradients": 4.0 * trained,
        "optimizer": (MOMENTS if layout.ranks == 1 else (MOMENTS + MASTER_COPY) / layout.ranks) * trained,
    }
    moment, worst = max(_Moments(step, layout).all().items(), key=lambda item: sum(item[1].values()))
    parts = {name: held.get(name, 0.0) + worst.get(name, 0.0) for name in MEMORY_PARTS}
    return Footprint(parts, moment, base if layout.offload else 0.0)


def checkpoint_bytes(trained: int, stage: StageConfig) -> float:
    """Bytes of a stage's checkpoints on disk: parameters and both moments, in the kept checkpoints, the best weights,
    and a checkpoint being written."""
    return 12.0 * trained * (stage.keep_checkpoints + 2)


def base_bytes(shapes: Shapes, dtype_bytes: int = 2, *, nf4: bool = False) -> float:
    """Bytes of the frozen base; with ``nf4``, embedding, head and norms keep their precision."""
    if not nf4:
        return float(dtype_bytes * shapes.parameters)
    in_layers = shapes.layers * shapes.layer_parameters
    return NF4_BYTES * in_layers + dtype_bytes * (shapes.parameters - in_layers)


def state_bytes(shapes: Shapes, student: StudentConfig, dtype_bytes: int = 2) -> tuple[float, float]:
    """Bytes of (far sums in float32, window of keys and values) per sequence during generation, at any length.

    Kept groups and layers are not counted: their cache grows with the sequence (:func:`kept_bytes_per_token`).
    """
    with torch.device("meta"):
        state = layer_student(shapes, student).empty_state(1, dtype=torch.bfloat16)
    layers = shapes.layers - kept_layers(shapes, student)
    numbers = {name: t for name, t in state.tensors().items() if t.is_floating_point()}
    far = sum(t.nbytes for name, t in numbers.items() if name not in state.near_fields)
    near = sum(t.numel() for name, t in numbers.items() if name in state.near_fields)
    return float(layers * far), float(layers * dtype_bytes * near)


def kept_bytes_per_token(shapes: Shapes, student: StudentConfig, dtype_bytes: int = 2) -> float:
    """Bytes that the keys and values of kept groups and layers add per token of a sequence."""
    return 2.0 * kept_total(student, shapes.layers, shapes.kv_heads) * shapes.head_dim * dtype_bytes


def _parts(gathered: float, activations: float, logits: float = 0.0) -> dict[str, float]:
    return {"gathered layers": gathered, "activations": activations, "logits": logits}


@dataclass(frozen=True)
class _Moments:
    """The moments of a step: bytes of each part at that moment, on top of what is held throughout."""

    step: StepSizes
    layout: Layout

    def all(self) -> dict[str, dict[str, float]]:
        """Parts by moment, in the order of the step."""
        stage = self.step.stage
        return self._lora(stage) if isinstance(stage, LoraConfig) else self._transfer(stage)

    @cached_property
    def student(self) -> StudentAttention:
        """The student of one layer, on the meta device."""
        return layer_student(self.step.shapes, self.step.student)

    def _transfer(self, stage: TransferConfig) -> dict[str, dict[str, float]]:
        """Nothing is kept between layers; a sharded head is gathered too (for one token, as the root must run)."""
        s, n, size = self.step.shapes, self.step.tokens, self.step.dtype_bytes
        hidden = float(size * s.hidden * n)
        mlp = n * size * (3.0 * s.mlp_width + 4.0 * s.hidden)
        return {
            "head gathered": _parts(self._gathered(layers=1, heads=2), hidden),
            "embedding": _parts(self._gathered(embeddings=2), hidden),
            "first layer gathered": _parts(self._gathered(layers=2, embeddings=1), hidden),
            "a layer gathered": _parts(self._gathered(layers=3), hidden),
            "MLP of a layer": _parts(self._gathered(layers=2), mlp),
            "student of a layer": _parts(self._gathered(layers=2), self._student_transfer(stage)),
        }

    def _lora(self, stage: LoraConfig) -> dict[str, dict[str, float]]:
        """With checkpointing, only layer inputs are kept and one layer is recomputed; otherwise everything is kept."""
        s, n, size = self.step.shapes, self.step.tokens, self.step.dtype_bytes
        saved = self._layer_saved(stage)
        checkpointed = stage.gradient_checkpointing
        kept = float(s.layers * (size * s.hidden * n if checkpointed else saved))
        inner = saved if checkpointed else 0.0
        mlp = 3.0 * size * s.mlp_width
        hidden = float(size * s.hidden * n)
        kept += size * s.hidden * self.step.row_tokens * stage.teacher_pass  # the teacher's hidden states
        kept += 2.0 * self.step.carried  # and what a piece makes of it
        final = 3.0 * hidden
        backward_mlp = kept + inner + n * (mlp + size * s.hidden)
        backward_student = kept + inner - n * mlp + self._student_backward()
        taught = self.step.row_tokens * (mlp + 4.0 * size * s.hidden) * stage.teacher_pass
        return {
            "MLP of the teacher": _parts(self._gathered(layers=2), taught),
            "embedding": _parts(self._gathered(embeddings=2), final),
            "a layer gathered": _parts(self._gathered(layers=3), kept),
            "head gathered": _parts(self._gathered(layers=1, heads=2), kept + final),
            # the loss has a copy of a sharded head; a tied one is in the root's unit too
            "loss over the vocabulary": _parts(
                self._gathered(embeddings=2.0 * s.tied, heads=1), kept + final + hidden, self._piece(stage)
            ),
            "backward of the head": _parts(self._gathered(heads=2), kept + final),
            "backward of an MLP": _parts(self._gathered(layers=2), backward_mlp),
            "backward of a student": _parts(self._gathered(layers=2), backward_student),
        }

    def _piece(self, stage: LoraConfig) -> float:
        """Bytes of a piece of the logits (`runtime.head`): logits and log-softmax; with a teacher also its log-softmax
        and probabilities; while a log-softmax of lower precision is made, its float32 copy."""
        logits = min(self.step.tokens, max(1, PIECE_ELEMENTS // self.step.shapes.vocab)) * self.step.shapes.vocab
        size = self.step.dtype_bytes
        arrays = size + (4.0 + size + 8.0 if stage.teacher_pass else 8.0)
        return float(logits * arrays)

    def _gathered(self, *, layers: float = 0, embeddings: float = 0, heads: float = 0) -> float:
        """Bytes of the given numbers of gathered units; without sharding, only the buffer for unpacked 4-bit weights.

        A tied embedding belongs to the root unit, which is gathered throughout.
        """
        s, layout, size = self.step.shapes, self.layout, self.step.dtype_bytes
        if layout.shared_by == 1:
            return float(size * s.hidden * s.mlp_width) if layout.nf4 and layers else 0.0
        if s.tied:
            embeddings, heads = max(1.0, embeddings), 0.0
        units = layers * s.layer_parameters + embeddings * s.embedding_parameters + heads * s.head_parameters
        if layout.offload and layers:
            units += s.layer_parameters / layout.shared_by
        return float(size * units)

    def _features(self) -> float:
        """Bytes per token of query and key features in float32."""
        return 4.0 * self.student.features * (self.step.shapes.heads + self.student.key_heads)

    def _layer_saved(self, stage: LoraConfig) -> float:
        """What autograd saves for one layer: matrices are frozen, so only inputs of LoRA, norms, MLP and student."""
        s, size = self.step.shapes, self.step.dtype_bytes
        dropout = 1.0 if stage.dropout > 0 else 0.0  # the mask
        adapted = (4.0 + dropout) * sum(inputs for inputs, _ in s.lora_layers(stage))
        if stage.train == "all":  # the inputs of q, k and v, of the output projection and of the MLP
            adapted += size * (2.0 * s.hidden + s.heads * s.head_dim)
        norms = 2 * 4.0 * s.hidden
        heads = size * (s.heads + 2 * s.kv_heads) * s.head_dim
        output = 4.0 * s.heads * (s.head_dim + 1)
        mlp = 3.0 * size * s.mlp_width
        graph = 4.0 * self.student.graph_numbers
        again = 0.0  # a piece's student has its window's tokens before it, beside copies of its own
        if self.step.carried:
            again = (self.step.tokens + 3.0 * self.student.cfg.window) * (heads + self._features() + output)
        return again + self.step.tokens * (adapted + norms + heads + self._features() + graph + output + mlp)

    def _student_transfer(self, stage: TransferConfig) -> float:
        """q, k, v, both outputs, the residual, a tile; with cross-entropy also all features and their gradients; the
        graph of a student that learns by autograd."""
        s = self.step.shapes
        features = 2.0 * self._features() if stage.xent_weight > 0 else 0.0
        if self.student.graph_numbers:
            features += self._features() + 4.0 * self.student.graph_numbers
        rows = self.step.dtype_bytes * (2 * (2 * s.heads + 2 * s.kv_heads) * s.head_dim + 2 * s.hidden)
        whole_rows = s.heads // s.kv_heads * self.step.seq_len
        return self.step.tokens * (rows + features) + self._tile(max(closed_form.TILE_TOKENS, whole_rows), 3, 2, 4, 1)

    def _student_backward(self) -> float:
        """Gradients of the features, of q, k, v and of the residual, and a tile."""
        s = self.step.shapes
        rows = 4.0 * (s.heads + 2 * s.kv_heads) * s.head_dim + 2.0 * self.step.dtype_bytes * s.hidden
        return self.step.tokens * (rows + self._features()) + self._tile(TILE_TOKENS, 6, 4, 6, 2)

    def _tile(self, most: int, queries: int, keys: int, columns: int, features: int) -> float:
        """Scratch of a tile of up to ``most`` query rows: the given numbers of arrays of queries, keys, window columns
        and features, plus the running sums (forward and backward)."""
        s, width = self.step.shapes, self.student.features
        rows = min(most, s.heads * self.step.tokens)
        dim, window = s.head_dim, self.student.cfg.window
        numbers = queries * dim + keys * dim * s.kv_heads / s.heads + columns * window
        share = self.student.key_heads / s.heads
        numbers += features * width * (1 + share) + 2.75 * share * width * dim / window
        return 4.0 * rows * numbers
