"""Every setting of the system, as frozen dataclasses; a recipe is one YAML file over them.

Field docstrings (the string below each field) are the help texts of the command line.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

import yaml

Kind = Literal["terrace", "sliding", "linear"]
"""Which keys are near (softmax) and which far (linear); the formula is in ``trenchcoat.ops.reference``."""

FeatureMapName = Literal["hedgehog", "hedgehog_half", "t2r", "exp", "exp_half", "elu"]


class UserError(ValueError):
    """A mistake of the user's: the message names the value, what was expected and the mend, in one line."""

    told = False
    """Whether another process has told the user already."""


class UsageError(UserError):
    """The command line or the recipe is wrong; nothing was started."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The pretrained softmax Transformer to start from."""

    path: str = "embedded"
    """Hub id, local folder in Hugging Face format, or `embedded` for the small Llama that ships with trenchcoat."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Precision of the frozen base weights; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    device: str = "auto"
    """`auto` (a GPU when there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    attention: str = "auto"
    """The attention the teacher runs: Transformers' `sdpa`, `eager`, `flash_attention_2`, ..., or `auto`: `sdpa` where
    the family can (gemma2 with its soft-cap and gpt_oss with its sinks cannot), else `eager`."""
    quantize: Literal["none", "nf4"] = "none"
    """`nf4` keeps the frozen base in 4 bits through bitsandbytes (QLoRA, https://arxiv.org/abs/2305.14314)."""


@dataclass(frozen=True, kw_only=True)
class FeatureMapConfig:
    """phi(x) = act(x W + b), one W per head, applied after RoPE (DESIGN section 1; LoLCATs, section 3.2)."""

    name: FeatureMapName = "hedgehog"
    """Activation: hedgehog (softmax of u and of -u), t2r (relu), exp, elu; `_half` keeps only the first of the pair."""
    feature_dim: int = 64
    """Columns of W. hedgehog and exp give twice as many features, the others exactly this many."""
    bias: bool | None = None
    """Learn a bias b; default (null): only for t2r."""
    skip: bool = False
    """Residual map u = x + x W (+ b); needs feature_dim equal to the head dimension."""
    adapter_dim: int | None = None
    """Width r of a bottleneck before the map, x + relu(x A) B with A [D, r], B [r, D]; null for none."""
    init: Literal["identity", "kaiming", "normal", "landmarks"] = "identity"
    """Initial W: identity (eye, rectangular when feature_dim != head dim), kaiming uniform, normal(0, 0.02), or
    landmarks (scores against keys of the first training rows). With `skip`, identity means W = 0."""
    eps: float = 1e-12
    """Features are clamped from below at this value."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The attention that replaces softmax."""

    name: str = "terrace"
    """Name in the STUDENTS registry: `terrace`, `sliding`, `linear`, `window_sinks`, or one of your own."""
    window: int = 64
    """W, in tokens. terrace: the near set is the query's own chunk of W and the one before; sliding: the last W."""
    feature_map: FeatureMapConfig = field(default_factory=FeatureMapConfig)
    """The feature map of queries and keys."""
    tied: bool = False
    """Share one feature map between queries and keys of a head."""
    key_maps: Literal["per_query_head", "per_kv_head"] = "per_query_head"
    """One key map per query head, or per key/value head (decoding state smaller by the GQA factor)."""
    affine: bool = False
    """Weight of the far part: 1 (false) or 1 - g (true)."""
    mix_init: float = 0.1
    """Initial g = sigmoid(mix), the weight of the near (softmax) part."""
    sinks: int = 0
    """The first `sinks` tokens of a row stay in the near set of every query."""
    keep_softmax: tuple[int, ...] = ()
    """Indices of layers that keep their softmax attention."""
    impl: Literal["chunkwise", "reference", "triton", "auto"] = "auto"
    """Implementation of the operator: chunkwise (PyTorch), reference (quadratic, for tests), triton (kernels for CUDA
    devices, checked at their first use), or auto (triton on CUDA devices where the kernels can do what the student
    asks, else chunkwise; the log says which and why)."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text, its template and its packing."""

    path: str = "embedded"
    """Hub id, local folder, `.json`, `.jsonl`, `.parquet` or `.txt` file, or `embedded` (Python's standard library).
    `path[5000]` takes 5000 rows of it, always the same ones, in its order (all, where it has fewer)."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split to train on."""
    validation_path: str | None = None
    """Separate validation file; without it the `validation` split, else rows held out from `split`."""
    validation_rows: int = 500
    """Rows held out from the front when there is no validation split."""
    validation_fraction: float | None = None
    """Hold out this fraction of the rows instead of `validation_rows`; of a `.txt` file, of its end (null: 0.05)."""
    format: Literal["auto", "alpaca", "chat", "text"] = "auto"
    """Schema of a row: {instruction, input, output}, {conversations | messages}, or {text}; `auto` looks at each row,
    so Long-LLM files, which mix {text} and {conversations}, need nothing."""
    text_column: str = "text"
    """Column read by the `text` format."""
    seq_len: int = 1024
    """Tokens of one training row, T."""
    packing: Literal["across", "contiguous"] = "across"
    """`across`: samples are concatenated and cut; `contiguous`: a row holds one sample (short rows are padded)."""
    mask_prompt: bool = True
    """alpaca and chat: only the response counts in the labels."""
    eos: bool = True
    """End every sample with the tokenizer's end token; false for models that never saw one (BOS then separates)."""
    max_rows: int | None = None
    """Use only this many rows of the source (after the held-out ones)."""
    min_tokens: int | None = None
    """Leave out (and count) samples of fewer tokens, marks included; held-out ones too."""
    max_tokens: int | None = None
    """Leave out (and count) samples of more tokens, marks included; held-out ones too."""
    select: Literal["none", "esl"] = "none"
    """`esl` trains on the samples with the largest effective sequence length (LoLCATs, equation 9): how far back the
    model's attention looks, over a sample's first `seq_len` tokens. One pass of the model, kept in `cache_dir`."""
    select_rows: int | None = None
    """Training samples that `select` keeps; needed with it."""
    streaming: bool = False
    """Read the training rows as a stream, for data larger than memory and disk cache. Needs max_steps in both stages,
    and `validation_rows`, a `validation` split or `validation_path`."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a broken line, a missing column or an empty output does: stop, or be skipped and counted."""
    cache_dir: str | None = None
    """Where tokenized data is kept, by a hash of its content; null is `~/.cache/trenchcoat`."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What both training stages share; read by `train.fit`."""

    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    beta1: float = 0.9
    """AdamW's first moment decay."""
    beta2: float = 0.999
    """AdamW's second moment decay."""
    epochs: float = 2.0
    """Passes over the training rows; ignored when max_steps is given."""
    max_steps: int | None = None
    """Optimizer steps; overrides epochs."""
    batch_size: int = 1
    """Rows a forward pass (micro-batch)."""
    accumulation: int = 8
    """Micro-batches an optimizer step, over all processes together."""
    clip: float | None = 1.0
    """Gradient norm limit; null for none."""
    clip_scope: Literal["layer", "global"] = "global"
    """Clip every layer's student by its own norm, or all trainable parameters by one norm."""
    schedule: Literal["plateau", "cosine", "linear", "constant"] = "plateau"
    """Learning-rate schedule; plateau is stepped on the evaluation loss (of each layer, with `clip_scope: layer`)."""
    warmup_steps: int = 0
    """Linear warm-up, in optimizer steps (any schedule)."""
    min_lr: float = 1e-5
    """Floor of the plateau, cosine and linear schedules."""
    plateau_factor: float = 0.1
    """plateau: what the rate is multiplied by."""
    plateau_patience: int = 10
    """plateau: evaluations without improvement before the rate falls."""
    eval_every: int = 100
    """Evaluate every this many optimizer steps (and at the end)."""
    eval_batches: int | None = None
    """Use only this many validation micro-batches; null for all."""
    save_every: int = 100
    """Write a resumable checkpoint every this many optimizer steps (and at the end)."""
    keep_checkpoints: int = 2
    """Complete checkpoints kept; each holds the best weights so far too."""
    early_stopping: int | None = None
    """Stop after this many evaluations without improvement; null for never. With `clip_scope: layer` every layer stops
    by itself."""
    early_stopping_threshold: float = 0.0
    """early_stopping: an evaluation is an improvement when it is below the best one by this share."""
    restore_best: bool = True
    """End with the weights of the best evaluation loss (with `clip_scope: layer`, of each layer's own)."""


@dataclass(frozen=True, kw_only=True)
class TransferConfig(StageConfig):
    """Stage 1, attention transfer (LoLCATs, section 3.1 and appendix A)."""

    lr: float = 1e-2
    """Peak learning rate of AdamW."""
    clip_scope: Literal["layer", "global"] = "layer"
    """The layers are independent: clip each student by its own norm, and schedule, keep and stop it by its own loss
    (`layer`); or clip all by one norm and judge them by their mean (`global`)."""
    mse_weight: float = 1000.0
    """Weight of the squared error of the attention outputs, before the output projection."""
    xent_weight: float = 0.0
    """Weight of the cross-entropy between the rows of both attention maps."""
    normalize: Literal["none", "layer"] = "none"
    """`layer` divides the squared error by mean(y^2) of that layer."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig(StageConfig):
    """Stage 2, LoRA with next-token loss (LoLCATs, section 3.1 and appendix A)."""

    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    rank: int = 8
    """LoRA rank r."""
    alpha: float = 16.0
    """LoRA alpha; updates are scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout before the LoRA matrices."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Names of the linear layers that get a LoRA."""
    train_feature_maps: bool = False
    """Train feature maps and mixes too."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run under `torchrun` is spread over its processes; nothing here acts on a single one."""

    shard: Literal["full", "node", "none"] = "full"
    """Who holds the frozen base: `full`, a share on every process (FSDP2); `node`, a whole copy a node, shared by its
    processes (HSDP); `none`, a whole copy on each."""
    node_size: int | None = None
    """Processes that share a copy under `node`; null is those that torchrun started on this node."""
    cpu_offload: bool = False
    """Keep the shards in host memory and bring them to the device layer by layer."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Collectives; `auto` is nccl on GPUs (with gloo for the host's), gloo on CPUs."""
    timeout_seconds: int = 600
    """A collective that waits longer than this ends the job."""
    async_save: bool = True
    """Write checkpoints while training goes on."""


@dataclass(frozen=True, kw_only=True)
class BlocksConfig:
    """Attention transfer block by block (`trenchcoat blocks`), for models larger than the machine."""

    size: int | None = None
    """Layers a block, k (the last block may have fewer); null is as many as the device's memory takes, for streaming
    at most the number that lets the next block be read meanwhile, and 1 where `ranks` is `pipeline`."""
    pass_tokens: str = "auto"
    """Tokens of one pass through the blocks: a number (`1M` is 1000000), `all` (the weights are read once), or `auto`:
    what is quickest with this machine's memory, disk and bandwidths."""
    hidden: Literal["auto", "memory", "disk"] = "auto"
    """Where a pass keeps the hidden states between two blocks; `auto`: in memory where they fit."""
    hidden_dir: str | None = None
    """Folder of hidden states on disk; null is `blocks/hidden` in the run's folder."""
    shard_mib: int = 256
    """Size of a file of hidden states at most, in MiB."""
    epochs: tuple[float, ...] = ()
    """Passes over the training rows of each block, in order; empty is `transfer.epochs` for all of them."""
    ranks: Literal["data", "pipeline"] = "data"
    """What several processes under torchrun do: `data`, all train the same block on their share of the micro-batches;
    `pipeline` (for `blocks run`), each holds a range of the blocks for good and hands its outputs to the next."""
    launcher: Literal["local", "slurm"] = "local"
    """Who runs `blocks run --parallel`: this machine's devices, or a Slurm job array (extra `cluster`)."""
    jobs: int | None = None
    """Blocks trained at once by the launcher; null is one a GPU (one without GPUs) for `local`, all for `slurm`."""
    slurm: tuple[str, ...] = ()
    """Further sbatch options as `name=value`: [partition=gpu, account=lab, time=240]."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The report's evaluation."""

    rows: int = 32
    """Validation rows scored."""
    batch_size: int = 4
    """Rows a forward pass."""
    seq_len: int | None = None
    """Tokens of an evaluation row; null is data.seq_len."""
    baselines: bool = True
    """Also train and score the comparison rows (LoRA only; window + sinks with the same LoRA budget)."""
    sinks: int = 4
    """Sink tokens of the window + sinks rows."""
    decode_lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """Context lengths at which decoding time and state size are measured; empty for none."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and how it is reproduced."""

    dir: str = "runs/default"
    """The run's folder: recipe, log, checkpoints, adapter, report."""
    seed: int = 0
    """Seed of initialisation, data order and dropout."""
    threads: int | None = None
    """CPU threads; null leaves torch's choice."""
    progress: Literal["auto", "bar", "plain", "off"] = "auto"
    """Progress display: a bar on a terminal, plain lines otherwise."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Send metrics there too (extra `track`); `metrics.jsonl` is always written."""
    project: str = "trenchcoat"
    """Project name for the trackers."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
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
    """Processes, when there are several."""
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    """Transfer block by block."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation and report."""
    run: RunConfig = field(default_factory=RunConfig)
    """Folder, seed, display."""


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML text, every field written out; ``recipe_io.load_recipe`` reads it back to an equal recipe."""
    return yaml.safe_dump(_plain(asdict(recipe)), sort_keys=False, allow_unicode=True)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
