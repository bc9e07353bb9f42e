"""Every setting, as frozen dataclasses; a recipe is a YAML file that sets some of them.

The string below a field is its help text on the command line, its type defines the valid values. Constraints between
fields are checked by the ``check`` method of their class, when a recipe is read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal

from trenchcoat.config.errors import UserError
from trenchcoat.config.keep import read_keep
from trenchcoat.config.paths import absolute_if_here, expanded
from trenchcoat.config.registries import STUDENT_NAMES, NameIn, takes_whole_layers, unused_settings
from trenchcoat.config.units import parse_tokens

Kind = Literal["terrace", "sliding", "linear"]
"""Which keys are near (softmax) and which far (linear); the formula is in ``trenchcoat.ops.reference``."""

TEXT_HELD_OUT = 0.05
"""Share of a plain-text document held out from its end where ``data.validation_fraction`` is null."""

KNOWN_FEATURE_MAPS = ["hedgehog", "hedgehog_half", "t2r", "exp", "exp_half", "elu"]
"""Names of `student.feature_map.name`; `trenchcoat.students.feature_maps` defines them and registers yours."""


@dataclass(frozen=True)
class Constraint:
    """A condition on a field's value beyond its type, as in ``Annotated[int, Constraint(...)]``; null always passes."""

    text: str
    """Completes "must be ..."."""
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class ReadBy:
    """The value of a field is read by a function of (value, path), as in ``Annotated[tuple[str, ...], ReadBy(f)]``."""

    function: Callable[[Any, str], Any]


PositiveInt = Annotated[int, Constraint("at least 1", lambda value: value >= 1)]
NonNegativeInt = Annotated[int, Constraint("at least 0", lambda value: value >= 0)]
RowLength = Annotated[int, Constraint("at least 2", lambda value: value >= 2)]
PositiveFloat = Annotated[float, Constraint("above 0 and finite", lambda value: 0 < value < math.inf)]
NonNegativeFloat = Annotated[float, Constraint("at least 0 and finite", lambda value: 0 <= value < math.inf)]
Share = Annotated[float, Constraint("at least 0 and below 1", lambda value: 0 <= value < 1)]
LogBase = Annotated[float, Constraint("above 1 and finite", lambda value: 1 < value < math.inf)]
InnerShare = Annotated[float, Constraint("above 0 and below 1", lambda value: 0 < value < 1)]
Text = Annotated[str, Constraint("text that is not empty", lambda value: bool(value.strip()))]
ScheduleName = Annotated[str, NameIn("trenchcoat.training.schedules", "SCHEDULES")]
LayerNames = Annotated[tuple[str, ...], Constraint("the names of one linear layer or more", bool)]


SOURCE, PLACE = {"path": "source"}, {"path": "place"}
"""Marks of fields that hold a path; a source may be a hub id or `embedded` instead."""


class _Section:
    def __post_init__(self) -> None:
        """Expand `~` in paths."""
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if "path" in each.metadata and isinstance(value, str):
                object.__setattr__(self, each.name, expanded(value))

    def check(self, path: str) -> None:
        """Raise ``UserError`` for incompatible fields; ``path`` is the section's path in the recipe."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Section):
    """The pretrained softmax Transformer to start from."""

    path: Text = field(default="embedded", metadata=SOURCE)
    """Hub id, local folder in Hugging Face format, or `embedded` for the small Llama that ships with trenchcoat."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Precision of the frozen base weights; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    device: Text = "auto"
    """`auto` (a GPU when there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    attention: str = "auto"
    """The teacher's attention implementation: Transformers' `sdpa`, `eager`, `flash_attention_2`, ..., or `auto`:
    `sdpa` where the family supports it (gemma2 with its soft-cap and gpt_oss with its sinks do not), else `eager`."""
    quantize: Literal["none", "nf4"] = "none"
    """`nf4` keeps the frozen base in 4 bits through bitsandbytes (QLoRA, https://arxiv.org/abs/2305.14314)."""


@dataclass(frozen=True, kw_only=True)
class FeatureMapConfig(_Section):
    """phi(x) = act(x W + b), one W per head, applied after RoPE (DESIGN section 1; LoLCATs, section 3.2)."""

    name: Annotated[str, NameIn(__name__, "KNOWN_FEATURE_MAPS")] = "hedgehog"
    """Activation: hedgehog (softmax of u and of -u), t2r (relu), exp, elu; `_half` keeps only the first of the pair."""
    feature_dim: PositiveInt = 64
    """Columns of W. hedgehog and exp give twice as many features, the others exactly this many."""
    bias: bool | None = None
    """Learn a bias b; default (null): only for t2r."""
    skip: bool = False
    """Residual map u = x + x W (+ b); needs feature_dim equal to the head dimension."""
    adapter_dim: PositiveInt | None = None
    """Width r of a bottleneck before the map, x + relu(x A) B with A [D, r], B [r, D]; null for none."""
    init: Literal["identity", "kaiming", "normal", "landmarks"] = "identity"
    """Initial W: identity (eye, rectangular when feature_dim != head dim), kaiming uniform, normal(0, 0.02), or
    landmarks (scores against keys of the first training rows). With `skip`, identity means W = 0."""
    eps: PositiveFloat = 1e-12
    """Features are clamped from below at this value."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig(_Section):
    """The attention that replaces softmax."""

    name: Annotated[str, STUDENT_NAMES] = "terrace"
    """Near and far part: `terrace` and `sliding`, softmax over a window and linear attention over what is older;
    `linear`, linear attention alone; `window_sinks`, softmax over the window and sinks alone; `terrace_gated`, a
    terrace whose far part forgets; `gdn`, `kda` and `lightning`, a memory of all tokens beside the window;
    `gated_delta_layer`, a layer of Qwen3.5 in place of the projections too; or one that you registered. A setting that
    it does not use is refused."""
    window: PositiveInt = 64
    """W, in tokens. terrace: the near set is the query's own chunk of W and the one before; sliding: the last W. The
    report divides near from far tokens by it (linear: by the default)."""
    feature_map: FeatureMapConfig = field(default_factory=FeatureMapConfig)
    """The feature map of queries and keys."""
    tied: bool = False
    """Share one feature map between queries and keys of a head."""
    key_maps: Literal["per_query_head", "per_kv_head"] = "per_query_head"
    """One key map per query head, or per key/value head (decoding state smaller by the GQA factor)."""
    affine: bool = False
    """Weight of the far part: 1 (false) or 1 - g (true)."""
    mix_init: InnerShare = 0.1
    """Initial g = sigmoid(mix), the weight of the near (softmax) part."""
    sinks: NonNegativeInt = 0
    """The first `sinks` tokens of a row stay in the near set of every query."""
    keep: Annotated[tuple[str, ...], ReadBy(read_keep)] = ()
    """Key/value groups that keep their softmax attention (a group is one key/value head with its query heads): a list
    of layers and groups, [23, 18.2, 7.2]; or a share of the cache (`13%`) or a number of groups (`12`), which are
    chosen by measurement (`trenchcoat select`)."""
    keep_softmax: tuple[NonNegativeInt, ...] = ()
    """Indices of whole layers that keep their softmax attention."""
    kept_log_scale: LogBase | None = None
    """a: scores of kept heads are multiplied by ln(t + a) / ln(a), t being the tokens before the query; null: not."""
    impl: Literal["chunkwise", "compiled", "reference", "triton", "fla", "auto"] = "auto"
    """Implementation of the operator: chunkwise (PyTorch), compiled (kernels for CPUs, built by the machine's C++
    compiler at their first use), triton (kernels for CUDA devices), fla (gdn, kda, lightning and gated_delta_layer:
    the kernels of flash-linear-attention), reference (quadratic, for tests), or auto (compiled on CPUs, triton or fla
    on CUDA devices where they support the student, else chunkwise; the log says which and why)."""

    def check(self, path: str = "student") -> None:
        """Raise ``UserError`` for kept groups of a layer whose student takes the place of the whole layer."""
        parts = [entry for entry in self.keep if not entry.isdigit()]
        if parts and takes_whole_layers(self.name):
            raise UserError(
                f"{path}.name={self.name} takes the place of whole layers, so no layer can keep some of its groups "
                f"({path}.keep={','.join(parts)}): name whole layers, such as {path}.keep_softmax=[0,7], and "
                f"{path}.keep=none"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Section):
    """Text, its template and its packing."""

    path: Text = field(default="embedded", metadata=SOURCE)
    """Hub id, local folder, `.json`, `.jsonl`, `.parquet`, `.csv`, `.tsv` or `.txt` file (text also compressed: `.gz`,
    `.bz2`, `.xz`, `.zst`), a pattern of files (`data/*.jsonl.gz`), or `embedded` (Python's standard library).
    `path[5000]` takes a fixed random sample of 5000 rows, in their original order (all rows if it has fewer)."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: Text = "train"
    """Split to train on."""
    validation_path: str | None = field(default=None, metadata=SOURCE)
    """Separate validation file; without it the `validation` split, else rows held out from `split`."""
    validation_rows: PositiveInt = 500
    """Rows held out from the front when there is no validation split; a tenth of the rows where there are no more than
    this (`streaming`: an error)."""
    validation_fraction: InnerShare | None = None
    """Hold out this fraction of the rows instead of `validation_rows`; for a `.txt` file, of the text, from its end
    (null: 0.05)."""
    format: Annotated[str, NameIn("trenchcoat.data.formats", "FORMATS", ("auto",))] = "auto"
    """Schema of a row: `alpaca` {instruction, input, output}, `chat` {conversations | messages}, `text` {text}, or one
    that you registered; `auto` decides row by row, so Long-LLM files, which mix {text} and {conversations}, work as
    they are."""
    text_column: str = "text"
    """Column read by the `text` format."""
    seq_len: RowLength = 1024
    """Tokens of one training row, T."""
    packing: Literal["across", "contiguous"] = "across"
    """`across`: samples are concatenated and cut; `contiguous`: a row holds one sample (short rows are padded)."""
    mask_prompt: bool = True
    """alpaca and chat: the loss is on the response only."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Begin every sample with what the tokenizer itself puts before a text (`auto`; nothing before a text that a chat
    template has written), as prompts and benchmarks do; or with its BOS token (`always`), or with neither (`never`)."""
    eos: bool = True
    """End every sample with the tokenizer's EOS token; false for models trained without one."""
    max_rows: PositiveInt | None = None
    """Use only this many rows of the source (after the held-out ones)."""
    min_tokens: PositiveInt | None = None
    """Drop (and count) samples with fewer tokens, BOS and EOS included; held-out samples too."""
    max_tokens: PositiveInt | None = None
    """Drop (and count) samples with more tokens, BOS and EOS included; held-out samples too."""
    select: Literal["none", "esl"] = "none"
    """`esl` trains on the rows with the largest effective sequence length (LoLCATs, equation 9): how far back the
    model's attention looks. Samples are cut into rows of `seq_len` tokens first. Takes one pass of the model; the
    scores are kept in `cache_dir`."""
    select_rows: PositiveInt | None = None
    """Number of training rows that `select` keeps; required with it."""
    streaming: bool = False
    """Read the training rows as a stream, for data larger than memory and disk cache. Needs max_steps in both stages,
    and `validation_rows`, a `validation` split or `validation_path`."""
    on_bad_row: Literal["error", "skip"] = "error"
    """On a broken line, a missing column or an empty output: stop, or skip and count the row."""
    cache_dir: str | None = field(default=None, metadata=PLACE)
    """Cache folder of tokenized data, keyed by a content hash; null is `~/.cache/trenchcoat`."""

    def check(self, path: str = "data") -> None:
        """Raise ``UserError`` for incompatible fields."""
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UserError(
                f"{path}.min_tokens must be at most {path}.max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )
        if (self.select == "none") != (self.select_rows is None):
            raise UserError(
                f"{path}.select={self.select} and {path}.select_rows={self.select_rows} do not fit: set both, for "
                f"example {path}.select=esl {path}.select_rows=5000, or neither"
            )
        needs_all_rows = {"select": "none", "max_rows": None, "validation_fraction": None}
        for name, unset in needs_all_rows.items() if self.streaming else ():
            if getattr(self, name) != unset:
                instead = " (data.validation_rows works)" if name == "validation_fraction" else ""
                raise UserError(
                    f"{path}.{name}={getattr(self, name)} needs to see all rows, but {path}.streaming=true does not: "
                    f"remove one of the two{instead}"
                )


@dataclass(frozen=True, kw_only=True)
class StageConfig(_Section):
    """Settings of both training stages; read by `training.loop.fit`."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    beta1: Share = 0.9
    """AdamW's first moment decay."""
    beta2: Share = 0.999
    """AdamW's second moment decay."""
    epochs: PositiveFloat = 2.0
    """Passes over the training rows; ignored when max_steps is given."""
    max_steps: PositiveInt | None = None
    """Optimizer steps; overrides epochs."""
    batch_size: PositiveInt = 1
    """Rows per forward pass (micro-batch)."""
    accumulation: PositiveInt = 8
    """Micro-batches per optimizer step, over all processes together."""
    clip: PositiveFloat | None = 1.0
    """Gradient norm limit; null for none."""
    clip_scope: Literal["layer", "global"] = "global"
    """Clip every layer's student by its own norm, or all trainable parameters by one norm."""
    schedule: ScheduleName = "plateau"
    """Learning-rate schedule; plateau is stepped on the evaluation loss (of each layer, with `clip_scope: layer`)."""
    warmup_steps: NonNegativeInt = 0
    """Linear warm-up, in optimizer steps (any schedule)."""
    min_lr: NonNegativeFloat = 1e-5
    """Final (lowest) rate of the plateau, cosine and linear schedules."""
    plateau_factor: InnerShare = 0.1
    """plateau: factor that the rate is multiplied by."""
    plateau_patience: NonNegativeInt = 10
    """plateau: evaluations without improvement before the rate is reduced."""
    eval_every: PositiveInt = 100
    """Optimizer steps between evaluations (there is also one at the end)."""
    eval_batches: PositiveInt | None = None
    """Use only this many validation micro-batches; null for all."""
    save_every: PositiveInt = 100
    """Optimizer steps between resumable checkpoints (there is also one at the end)."""
    keep_checkpoints: PositiveInt = 2
    """Number of checkpoints kept; each also holds the best weights so far."""
    early_stopping: PositiveInt | None = None
    """Stop after this many evaluations without improvement; null for never. With `clip_scope: layer` every layer stops
    on its own."""
    early_stopping_threshold: Share = 0.0
    """early_stopping: relative decrease of the best loss that counts as an improvement."""
    restore_best: bool = True
    """Restore the weights with the best evaluation loss at the end (with `clip_scope: layer`, for each layer
    separately)."""

    def check(self, path: str) -> None:
        """Raise ``UserError`` for a schedule that would end above its start."""
        if self.schedule != "constant" and self.min_lr > self.lr:
            raise UserError(f"{path}.min_lr must be at most {path}.lr ({self.lr:g}), got {self.min_lr:g}")


@dataclass(frozen=True, kw_only=True)
class TransferConfig(StageConfig):
    """Stage 1, attention transfer (LoLCATs, section 3.1 and appendix A)."""

    lr: PositiveFloat = 1e-2
    """Peak learning rate of AdamW."""
    clip_scope: Literal["layer", "global"] = "layer"
    """`layer`: clip each student by its own norm, and use its own loss for its schedule, best weights and early
    stopping (the layers are independent); `global`: one norm and the mean loss for all."""
    mse_weight: NonNegativeFloat = 1000.0
    """Weight of the squared error of the attention outputs, before the output projection (gated_delta_layer: behind
    it)."""
    xent_weight: NonNegativeFloat = 0.0
    """Weight of the cross-entropy between the rows of the teacher's and the student's attention maps."""
    normalize: Literal["none", "layer"] = "none"
    """`layer` divides the squared error by mean(y^2) of that layer."""
    copies_lr: PositiveFloat | None = None
    """gated_delta_layer: peak learning rate of its copies of q, k, v and o; null: a tenth of lr. The schedule scales
    both alike."""

    def check(self, path: str) -> None:
        """Raise ``UserError`` for a bad schedule, or when there is no loss."""
        super().check(path)
        if self.mse_weight == 0 and self.xent_weight == 0:
            raise UserError(f"{path}.mse_weight and {path}.xent_weight are both 0: there is no loss to train on")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(StageConfig):
    """Stage 2: LoRA (or every weight), and the feature maps and mixes, trained through the whole model."""

    train: Literal["lora", "mixer", "all"] = "lora"
    """What is trained: `lora`, with the feature maps and mixes; `mixer`, the feature maps and mixes alone; `all`, every
    weight, in float32 (the adapter then holds them all; the teacher's are kept beside them)."""

    loss: Annotated[str, NameIn("trenchcoat.training.losses", "OBJECTIVES")] = "kl"
    """What is minimized: `kl`, the divergence KL(teacher || student) of the next token's distribution at every token,
    the teacher being the same model with its own attention and without LoRA; `ce`, the next-token cross-entropy of the
    text (LoLCATs, section 3.1); `mix`, both; or a name that you added to OBJECTIVES in
    `trenchcoat.training.losses`."""
    kl_weight: InnerShare = 0.9
    """mix: weight of kl; ce has 1 - kl_weight."""
    teacher_logits: str | None = field(default=None, metadata=PLACE)
    """kl and mix: folder of the teacher's logits on disk, the 256 most likely tokens of each position and the rest as
    one; what is missing there is computed first, in one pass of the teacher. Null: the teacher runs in every step."""
    seq_len: RowLength | None = None
    """Tokens of one training row of this stage; null is data.seq_len. Feature maps need rows as long as the use, a
    correction of the projections does not."""
    piece_len: RowLength | None = None
    """Tokens of a row that a step reads and differentiates at once, for rows of 8,192 tokens and more: the students'
    states and the kept groups' keys and values are carried from one piece to the next, gradients are not (truncated
    backpropagation). Null: whole rows."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate of AdamW."""
    mixer_lr: PositiveFloat | None = None
    """Peak learning rate of the feature maps and mixes; null: lr. The schedule scales both alike."""
    rank: PositiveInt = 8
    """LoRA rank r."""
    alpha: PositiveFloat = 16.0
    """LoRA alpha; updates are scaled by alpha / rank."""
    dropout: Share = 0.0
    """Dropout before the LoRA matrices."""
    targets: LayerNames = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Names of the linear layers that LoRA is applied to, in the attention or the MLP (gate_proj, up_proj, down_proj;
    not in a mixture of experts)."""
    train_feature_maps: bool = True
    """Train feature maps and mixes too; false needs `train: lora` or `all`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""

    def check(self, path: str) -> None:
        """Raise ``UserError`` for a bad schedule, or when there is nothing to train."""
        super().check(path)
        if self.train == "mixer" and not self.train_feature_maps:
            raise UserError(
                f"{path}.train=mixer with {path}.train_feature_maps=false leaves nothing to train: remove one of them"
            )
        if self.piece_len is not None and self.gradient_checkpointing:
            raise UserError(
                f"{path}.piece_len={self.piece_len} with {path}.gradient_checkpointing=true: a piece changes the state "
                f"that it starts from, so it cannot be computed again. Remove {path}.gradient_checkpointing; a smaller "
                f"{path}.piece_len saves memory too"
            )

    @property
    def teacher_pass(self) -> bool:
        """Whether a step runs the teacher too: one more forward pass."""
        return self.loss in ("kl", "mix") and self.teacher_logits is None


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(_Section):
    """How a run under `torchrun` is distributed over its processes; a single process ignores these settings."""

    shard: Literal["full", "node", "none"] = "full"
    """Sharding of the frozen base: `full`, over all processes (FSDP2); `node`, one copy per node, sharded over its
    processes (HSDP); `none`, a full copy on each process."""
    node_size: PositiveInt | None = None
    """Processes per copy with `node`; null is those that torchrun started on this node."""
    cpu_offload: bool = False
    """Keep the shards in host memory and bring them to the device layer by layer."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Backend of collectives; `auto` is nccl on GPUs (with gloo for host tensors), gloo on CPUs."""
    timeout_seconds: PositiveInt = 600
    """A collective that waits longer than this ends the job."""
    async_save: bool = True
    """Write checkpoints in the background, while training continues."""


@dataclass(frozen=True, kw_only=True)
class BlocksConfig(_Section):
    """Attention transfer block by block (`trenchcoat blocks`), for models larger than the machine."""

    size: PositiveInt | None = None
    """Layers per block, k (the last block may have fewer); null is as many as fit in device memory (when streaming,
    leaving room to read the next block meanwhile), and 1 where `ranks` is `pipeline`."""
    pass_tokens: str = "auto"
    """Tokens of one pass through the blocks: a number (`1M` is 1000000), `all` (the weights are read once), or `auto`:
    the fastest choice for this machine's memory, disk and bandwidths."""
    hidden: Literal["auto", "memory", "disk"] = "auto"
    """Where a pass keeps the hidden states between two blocks; `auto`: in memory where they fit."""
    hidden_dir: str | None = field(default=None, metadata=PLACE)
    """Folder of hidden states on disk; null is `blocks/hidden` in the run's folder."""
    shard_mib: PositiveInt = 256
    """Maximum size of a file of hidden states, in MiB."""
    epochs: tuple[PositiveFloat, ...] = ()
    """Passes over the training rows of each block, in order; empty is `transfer.epochs` for all blocks."""
    ranks: Literal["data", "pipeline"] = "data"
    """How processes under torchrun divide the work: `data`, all train the same block on their share of the
    micro-batches; `pipeline` (for `blocks run`), each holds a range of the blocks and sends its outputs to the next."""
    launcher: Literal["local", "slurm"] = "local"
    """Where `blocks run --parallel` runs: on this machine's devices, or as a Slurm job array (extra `cluster`)."""
    jobs: PositiveInt | None = None
    """Blocks trained at once by the launcher; null is one per GPU (one without GPUs) for `local`, all for `slurm`."""
    slurm: tuple[str, ...] = ()
    """Further sbatch options as `name=value`: [partition=gpu, account=lab, time=240]."""

    def check(self, path: str) -> None:
        """Raise ``UserError`` for a ``pass_tokens`` that is not a number of tokens."""
        parse_tokens(self.pass_tokens, f"{path}.pass_tokens")


@dataclass(frozen=True, kw_only=True)
class SelectConfig(_Section):
    """How the key/value groups to keep are chosen where `student.keep` is a share or a number (`trenchcoat select`)."""

    method: Annotated[str, NameIn("trenchcoat.conversion.selection.registry", "METHODS")] = "gates"
    """How groups are scored. `gates`: what far text is worth to the loss, by backward passes; `retrieval`: attention to
    what followed the same token earlier, forward only; `uniform` and `random`: without measuring, for comparison."""
    loss: Literal["kl", "ce"] = "kl"
    """gates: the loss that is differentiated, the divergence from the model itself or the next-token loss. The first
    sees the whole distribution of every token, so its ranking varies less from text to text."""
    rows: PositiveInt = 4
    """Rows of training text, and as many of text that follows itself, that groups are scored on."""
    seq_len: RowLength | None = None
    """Tokens of these rows (the repeated text is half as long), at least 4 windows; null is data.seq_len."""
    gates: Annotated[tuple[InnerShare, ...], Constraint("a list of one share or more", bool)] = (0.05, 0.5, 0.95)
    """gates: shares of full attention, the rest is window + sinks, at which the loss is differentiated."""
    frontier: tuple[InnerShare, ...] = (0.03, 0.07, 0.13, 0.2, 0.33)
    """Shares of the cache for which the loss is measured without training, besides 0 and 1; empty for no frontier."""
    frontier_rows: PositiveInt = 8
    """Held-out rows of text for the frontier, and half as many of text that follows itself."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(_Section):
    """The report's evaluation."""

    rows: PositiveInt = 32
    """Validation rows scored."""
    batch_size: PositiveInt = 4
    """Rows per forward pass."""
    seq_len: RowLength | None = None
    """Tokens of an evaluation row; null is data.seq_len."""
    length_factors: tuple[PositiveInt, ...] = (1, 2, 4)
    """Also score rows of so many times that length (fewer of them: as many tokens), and copies of half of it; what the
    held-out text or the model's positions are too short for is left out."""
    copy_rows: NonNegativeInt = 8
    """Rows that are a text of half their length followed by itself; also of random tokens, more if they are too few for
    a standard error below 5 points. 0: none."""
    baselines: bool = True
    """Also train and score the comparison rows: stage 2 without transfer, on window + sinks, and on the teacher."""
    constant: bool = False
    """Also convert the model without kept groups, by the same stages, and score that: a state of constant size."""
    sinks: NonNegativeInt = 4
    """Sink tokens of the window + sinks rows."""
    decode_lengths: tuple[PositiveInt, ...] = (128, 256, 512, 1024, 2048)
    """Context lengths at which decoding time and state size are measured; empty for none."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(_Section):
    """A run's folder, seed and display."""

    dir: Text = field(default="runs/default", metadata=PLACE)
    """The run's folder: recipe, log, checkpoints, adapter, report."""
    seed: NonNegativeInt = 0
    """Seed of initialisation, data order and dropout."""
    threads: PositiveInt | None = None
    """CPU threads; null keeps PyTorch's default."""
    progress: Literal["auto", "bar", "plain", "off"] = "auto"
    """Progress display: a bar on a terminal, plain lines otherwise."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also send metrics to these (extra `track`); `metrics.jsonl` is always written."""
    project: str = "trenchcoat"
    """Project name for the trackers."""


@dataclass(frozen=True, kw_only=True)
class Recipe(_Section):
    """One complete run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The pretrained model."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The attention that replaces softmax."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation text."""
    transfer: TransferConfig | None = field(default_factory=TransferConfig)
    """Stage 1; null skips it (the no-transfer baseline)."""
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    """Stage 2; null skips it."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Distribution over several processes."""
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    """Transfer block by block."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """Selection of the key/value groups to keep."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation and report."""
    run: RunConfig = field(default_factory=RunConfig)
    """Folder, seed, display."""

    def row_tokens(self, stage: StageConfig | None = None) -> int:
        """Tokens of a training row of a stage."""
        own = stage.seq_len if isinstance(stage, LoraConfig) else None
        return own or self.data.seq_len

    def check(self, path: str = "") -> None:
        """Raise ``UserError`` for incompatible sections."""
        student, data = self.student, self.data
        windowed = "window" not in unused_settings(student.name)
        if windowed and self.lora is not None and self.lora.seq_len is not None and student.window > self.lora.seq_len:
            raise UserError(
                f"lora.seq_len must be at least student.window ({student.window}), got {self.lora.seq_len}: no token "
                "would be outside the window"
            )
        if windowed and student.window > data.seq_len:
            raise UserError(
                f"student.window must be at most data.seq_len ({data.seq_len}), got {student.window}: "
                "no token would be outside the window"
            )
        if student.sinks >= data.seq_len:
            raise UserError(f"student.sinks must be below data.seq_len ({data.seq_len}), got {student.sinks}")
        if self.lora is not None and self.lora.teacher_logits is not None and data.streaming:
            raise UserError(
                "lora.teacher_logits stores the logits of known rows, which data.streaming=true does not have: remove "
                "one of the two"
            )
        if self.lora is not None and self.lora.train == "all" and self.model.quantize != "none":
            raise UserError(
                f"lora.train=all cannot train the 4-bit weights of model.quantize={self.model.quantize}: set it to "
                "none, or lora.train=lora"
            )
        for name, stage in (("transfer", self.transfer), ("lora", self.lora)):
            if data.streaming and stage is not None and stage.max_steps is None:
                raise UserError(
                    f"data.streaming=true needs {name}.max_steps: a stream has no known length, so {name}.epochs "
                    f"({stage.epochs:g}) cannot be used"
                )


PATHS: dict[str, str] = {
    f"{section.name}.{each.name}": each.metadata["path"]
    for section in fields(Recipe)
    for each in fields(section.default_factory)  # type: ignore[arg-type]
    if "path" in each.metadata
}
"""Settings that are paths -> `source` (which may be a hub id or `embedded`) or `place`."""


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML text, every field written out that its student uses; ``recipe_io.load_recipe`` reads back an
    equal recipe.

    Paths are written absolute, so that it means the same in any folder; but `run.dir` is where the text is kept.
    """
    import yaml

    document = asdict(recipe)
    default = asdict(StudentConfig())
    for name in unused_settings(recipe.student.name):
        if document["student"][name] == default[name]:
            del document["student"][name]
    for path, kind in PATHS.items():
        section, name = path.split(".")
        value = (document[section] or {}).get(name)
        if value is not None and path != "run.dir":
            document[section][name] = absolute_if_here(value) if kind == "source" else os.path.abspath(value)
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
