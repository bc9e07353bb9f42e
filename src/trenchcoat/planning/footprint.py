"""How much memory one process needs at the worst moment of a training step, part by part, from sizes alone.

The arithmetic follows the step through its moments (a layer gathered in the forward pass, the vocabulary's loss, a
layer recomputed in the backward pass, ...) and keeps the largest. It agrees with :mod:`trenchcoat.planning.simulate`,
which runs the same step on fake tensors; `docs/PLAN.md` has both side by side. Not in it: the CUDA context, the buffers
of NCCL, the fragmentation of the allocator (`plan` adds a reserve for them).

What is held all along: this process's share of the frozen base; students and LoRA in float32, whole, with the gradients
of what is trained; AdamW's moments of that and, with several processes, the parameters and gradients that it steps: of
those, which are shards, this process's share.

FSDP2 holds three layers at the worst moment of a gather in the forward pass (the gathered buffer of the layer before,
which it keeps until the next copy is done, its own, and the copy that the layer computes with) and two in the backward
pass. Letters: n tokens of the micro-batch, h hidden size, H query and G key/value heads of dim D, F features, K key
maps, I columns of the MLP, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trenchcoat.config import LoraConfig, StudentConfig, TransferConfig
from trenchcoat.models.flops import layer_student, student_parameters
from trenchcoat.models.shapes import Shapes
from trenchcoat.ops.chunked import closed_form
from trenchcoat.ops.chunked.layout import TILE_TOKENS
from trenchcoat.students import StudentAttention

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in 4 bits, a constant of 8 bits for 64 of them, one of 32 for 256 constants (QLoRA, arXiv 2305.14314)."""
MOMENTS, MASTER_COPY = 8, 8
"""Bytes of a trained parameter: AdamW's two moments; with several processes, the parameter and gradient it steps."""

PARTS = ("weights", "gathered layers", "students", "LoRA", "gradients", "optimizer", "activations", "logits")
"""Names of the parts, in the order of a table."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the frozen base lies over the processes."""

    ranks: int = 1
    shared_by: int = 1
    """Processes that share one copy of the base (FSDP2); 1 is a whole copy on each."""
    offload: bool = False
    """Shards wait in host memory."""
    nf4: bool = False
    """Linear layers of the base in 4 bits."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process at its worst moment."""

    parts: dict[str, float]
    moment: str
    """When that is."""
    host: float = 0.0
    """Bytes in host memory for this process (offloaded shards)."""

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(self.parts.values())


def footprint(
    shapes: Shapes,
    student: StudentConfig,
    stage: TransferConfig | LoraConfig,
    layout: Layout,
    *,
    seq_len: int,
    dtype_bytes: int = 2,
) -> Footprint:
    """Memory of a step of ``stage``; ``dtype_bytes`` is a base weight's (and an activation's) size.

    Raises ``ValueError`` for a student that does not fit the model, ``UserError`` for unknown LoRA targets.
    """
    lora = isinstance(stage, LoraConfig)
    maps = student_parameters(shapes, student)
    adapters = shapes.lora_parameters(stage) if isinstance(stage, LoraConfig) else 0
    trained = adapters + (maps if not isinstance(stage, LoraConfig) or stage.train_feature_maps else 0)
    base = base_bytes(shapes, dtype_bytes, nf4=layout.nf4) / layout.shared_by
    held = {
        "weights": 0.0 if layout.offload else base,
        "students": 4.0 * maps,
        "LoRA": 4.0 * adapters,
        "gradients": 4.0 * trained,
        "optimizer": (MOMENTS if layout.ranks == 1 else (MOMENTS + MASTER_COPY) / layout.ranks) * trained,
    }
    step = _Step(shapes, layer_student(shapes, student), stage, layout, seq_len, dtype_bytes)
    moments = step.lora_moments() if lora else step.transfer_moments()
    moment, worst = max(moments.items(), key=lambda item: sum(item[1].values()))
    parts = {name: held.get(name, 0.0) + worst.get(name, 0.0) for name in PARTS}
    return Footprint(parts, moment, base if layout.offload else 0.0)


def base_bytes(shapes: Shapes, dtype_bytes: int = 2, *, nf4: bool = False) -> float:
    """Size of the frozen base; with ``nf4`` embedding, head and norms keep their precision."""
    if not nf4:
        return float(dtype_bytes * shapes.parameters)
    in_layers = shapes.layers * shapes.layer_parameters
    return NF4_BYTES * in_layers + dtype_bytes * (shapes.parameters - in_layers)


def state_bytes(shapes: Shapes, student: StudentConfig, dtype_bytes: int = 2) -> tuple[float, float]:
    """(far sums in float32, window of keys and values) of one sequence while text is written, however long it is.

    Layers that stay softmax are not counted: their cache grows.
    """
    with torch.device("meta"):
        state = layer_student(shapes, student).empty_state(1, dtype=torch.bfloat16)
    layers = shapes.layers - len(set(student.keep_softmax))
    numbers = {name: t for name, t in state.tensors().items() if t.is_floating_point()}
    far = sum(t.nbytes for name, t in numbers.items() if name not in state.near_fields)
    near = sum(t.numel() for name, t in numbers.items() if name in state.near_fields)
    return float(layers * far), float(layers * dtype_bytes * near)


@dataclass(frozen=True)
class _Step:
    """The moments of a step: what each holds beside what is held all along, in bytes."""

    shapes: Shapes
    student: StudentAttention
    stage: TransferConfig | LoraConfig
    layout: Layout
    seq_len: int
    size: int
    """Bytes of a base weight and of an activation that keeps the base's precision."""

    @property
    def tokens(self) -> int:
        return self.stage.batch_size * self.seq_len

    def transfer_moments(self) -> dict[str, dict[str, float]]:
        """Nothing is kept from layer to layer; a sharded head is gathered too (for one token: the root must be run)."""
        hidden = float(self.size * self.shapes.hidden * self.tokens)
        return {
            "head gathered": {"gathered layers": self._gathered(layers=1, heads=2), "activations": hidden},
            "embedding": {"gathered layers": self._gathered(embeddings=2), "activations": hidden},
            "first layer gathered": {
                "gathered layers": self._gathered(layers=2, embeddings=1),
                "activations": hidden,
            },
            "a layer gathered": {"gathered layers": self._gathered(layers=3), "activations": hidden},
            "MLP of a layer": {"gathered layers": self._gathered(layers=2), "activations": self._mlp_forward()},
            "student of a layer": {
                "gathered layers": self._gathered(layers=2),
                "activations": self._student_transfer(),
            },
        }

    def lora_moments(self) -> dict[str, dict[str, float]]:
        """With checkpointing the inputs of every layer are kept and one layer is computed again; else all are kept."""
        s, n = self.shapes, self.tokens
        kept = float(s.layers * (self.size * s.hidden * n if self._checkpointed else self._layer_saved()))
        inner = self._layer_saved() if self._checkpointed else 0.0
        mlp = 3.0 * self.size * s.mlp_width
        logits = float(n * s.vocab)
        final = 3.0 * self.size * s.hidden * n
        return {
            "embedding": {"gathered layers": self._gathered(embeddings=2), "activations": final},
            "a layer gathered": {"gathered layers": self._gathered(layers=3), "activations": kept},
            "head gathered": {
                "gathered layers": self._gathered(layers=1, heads=2),
                "activations": kept + final,
            },
            # the logits, their float32 copy, the log-softmax and its gradient
            "loss over the vocabulary": {
                "gathered layers": self._gathered(),
                "activations": kept + final,
                "logits": logits * (self.size + (12.0 if self.size < 4 else 8.0)),
            },
            "backward of the head": {
                "gathered layers": self._gathered(heads=2),
                "activations": kept + final,
                "logits": logits * 2.0 * self.size,
            },
            "backward of an MLP": {
                "gathered layers": self._gathered(layers=2),
                "activations": kept + inner + n * (mlp + self.size * s.hidden),
            },
            "backward of a student": {
                "gathered layers": self._gathered(layers=2),
                "activations": kept + inner - n * mlp + self._student_backward(),
            },
        }

    @property
    def _checkpointed(self) -> bool:
        return isinstance(self.stage, LoraConfig) and self.stage.gradient_checkpointing

    def _gathered(self, *, layers: float = 0, embeddings: float = 0, heads: float = 0) -> float:
        """Bytes of so many gathered units; without sharding only what 4-bit weights are unpacked into.

        A tied embedding belongs to the root unit, which is gathered throughout.
        """
        s = self.shapes
        if self.layout.shared_by == 1:
            return float(self.size * s.hidden * s.mlp_width) if self.layout.nf4 and layers else 0.0
        if s.tied:
            embeddings, heads = max(1.0, embeddings), 0.0
        units = layers * s.layer_parameters + embeddings * s.embedding_parameters + heads * s.head_parameters
        if self.layout.offload and layers:
            units += s.layer_parameters / self.layout.shared_by
        return float(self.size * units)

    def _layer_saved(self) -> float:
        """What autograd keeps of one layer: the matrices are frozen, so only what LoRA, norms, MLP and student need."""
        s, student = self.shapes, self.student
        assert isinstance(self.stage, LoraConfig)
        dropout = 1.0 if self.stage.dropout > 0 else 0.0  # the mask
        adapted = (4.0 + dropout) * sum(inputs for inputs, _ in s.lora_layers(self.stage))
        norms = 2 * 4.0 * s.hidden
        heads = self.size * (s.heads + 2 * s.kv_heads) * s.head_dim
        features = 4.0 * student.features * (s.heads + student.key_heads)
        output = 4.0 * s.heads * (s.head_dim + 1)
        mlp = 3.0 * self.size * s.mlp_width
        return self.tokens * (adapted + norms + heads + features + output + mlp)

    def _mlp_forward(self) -> float:
        return self.tokens * self.size * (3.0 * self.shapes.mlp_width + 4.0 * self.shapes.hidden)

    def _student_transfer(self) -> float:
        """q, k, v, both outputs, the residual, a tile; with the cross-entropy all features and their gradients."""
        s, student = self.shapes, self.student
        cross = isinstance(self.stage, TransferConfig) and self.stage.xent_weight > 0
        features = 8.0 * student.features * (s.heads + student.key_heads) if cross else 0.0
        rows = self.size * (2 * (2 * s.heads + 2 * s.kv_heads) * s.head_dim + 2 * s.hidden)
        whole_rows = s.heads // s.kv_heads * self.seq_len
        return self.tokens * (rows + features) + self._tile(max(closed_form.TILE_TOKENS, whole_rows), 3, 2, 4, 1)

    def _student_backward(self) -> float:
        """Gradients of the features, of q, k, v and of the residual, and a tile."""
        s, student = self.shapes, self.student
        features = 4.0 * student.features * (s.heads + student.key_heads)
        rows = 4.0 * (s.heads + 2 * s.kv_heads) * s.head_dim + 2.0 * self.size * s.hidden
        return self.tokens * (rows + features) + self._tile(TILE_TOKENS, 6, 4, 6, 2)

    def _tile(self, most: int, queries: int, keys: int, columns: int, features: int) -> float:
        """Scratch of a tile of up to ``most`` query rows: so many arrays of queries, of keys, of window columns, of
        features, and the running sums (forwards and backwards)."""
        s, width = self.shapes, self.student.features
        rows = min(most, s.heads * self.tokens)
        dim, window = s.head_dim, self.student.cfg.window
        numbers = queries * dim + keys * dim * s.kv_heads / s.heads + columns * window
        share = self.student.key_heads / s.heads
        numbers += features * width * (1 + share) + 2.75 * share * width * dim / window
        return 4.0 * rows * numbers
