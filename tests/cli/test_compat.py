"""The original's flags and configuration files as recipes: what each becomes, what is refused, what only warns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trenchcoat.cli.compat import scripts
from trenchcoat.cli.compat.configs import read_config
from trenchcoat.cli.compat.flags import FLAGS
from trenchcoat.cli.compat.plan import ScriptPlan
from trenchcoat.config import FeatureMapConfig, LoraConfig, TransferConfig, UserError
from trenchcoat.config.recipe_io import load_recipe

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"

THE_FLAGS = """
--model_config --distill_config --finetune_config --eval_config --lk_zero_init --lk_skip_connection --tie_qk_kernels
--train_qk --state_chunk_len --attention_type --learned_kernel --layers_per_model --layers_limit_min --layers_limit_max
--pretrained_model_name_or_path --load_distill_checkpoint --load_finetune_checkpoint --resume_distill --resume_finetune
--lr --weight_decay --optim --scheduler --gradient_accumulation_steps --num_train_epochs --max_steps --no_peft_grad_ckpt
--finetune_lr --finetune_attn_mlps --dataset_chunk_size --batch_size --num_workers --no_init_eval --eval_steps
--enable_fsdp --low_cpu_fsdp --pure_bf16 --fsdp_activation_checkpointing --fsdp_cpu_offload --huggingface_token
--checkpoint_dir --data_dir --replicate --seed --verbose --no_cuda --no_wandb --wandb_entity --project_name --debug
--lk_normal_init --window_size --max_finetune_steps --max_eval_batches --results_dir --no_attention_mask
--num_train_steps --num_generations --top_k --top_p --max_new_tokens --benchmark --print_model
""".split()
TERRACE, SLIDING, LINEAR = "lk_smd_wtk64_fd64_w01", "lk_smd_wsw64_fd64_w01", "lk_smd_fd64"
SMALL, LARGE = ("mistral_7b", "llama3_8b", "llama3_1_8b"), ("llama3_1_70b", "llama3_1_405b")
MODELS = [f"distill_{model}_{kind}" for model in (*SMALL, *LARGE) for kind in (TERRACE, SLIDING, LINEAR)]
MODELS += [f"distill_{model}_{kind}" for model in SMALL for kind in ("lk_t2r", f"{TERRACE}_attn4layers")]
ALPACA = "distill_alpaca_clean_xent0_mse1000_lr1e-2"
DISTILLS = [
    ALPACA, "distill_alpaca_clean_xent1_mse1000_lr1e-2", "no_distill_alpaca_clean",
    "distill_rpcontig1024_dcs1024_xent0_mse1000_lr1e-2", "distill_rpcontig2048_dcs2048_xent0_mse1000_lr1e-2",
]  # fmt: skip
FINETUNES = [
    f"finetune_lora_{targets}_alpaca_clean{size}"
    for targets in ("qkvo", "qv")
    for size in ("", "_llama3_1_70b", "_llama3_1_405b")
]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., ScriptPlan]:
    """``plan(stage, "--flag ...")``: the plan of a command line over the 8B configurations, from an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trenchcoat.cli.compat.scripts.base_config", lambda path: None)

    def made(stage: str = "transfer", line: str = "", **configs: str) -> ScriptPlan:
        names = {"model": f"distill_llama3_1_8b_{TERRACE}", "distill": ALPACA, "finetune": FINETUNES[0], **configs}
        words = [word for kind, name in names.items() for word in (f"--{kind}_config", name)]
        return scripts.plan_of(stage, [*words, *line.split()], CONFIGS)  # type: ignore[arg-type]

    return made


def test_the_set_of_flags_is_frozen() -> None:
    assert {f"--{flag.name}" for flag in FLAGS} == set(THE_FLAGS)
    assert len(FLAGS) == len(THE_FLAGS)


def test_the_documented_table_is_the_programs() -> None:
    text = (REPOSITORY / "docs" / "COMPAT.md").read_text(encoding="utf-8")
    for flag in FLAGS:
        assert f"| `--{flag.name}` | {flag.effect} |\n" in text


@pytest.mark.parametrize("model", MODELS)
def test_every_named_model_configuration_is_a_checked_recipe(model: str, plan: Callable[..., ScriptPlan]) -> None:
    student = plan(model=model).recipe.student
    kind = model.removesuffix("_attn4layers")
    name = {TERRACE: "terrace", SLIDING: "sliding", LINEAR: "linear", "t2r": "linear"}
    assert student.name == next(value for end, value in name.items() if kind.endswith(end))
    assert student.keep_softmax == ((7, 15, 23, 31) if model.endswith("attn4layers") else ())
    assert student.mix_init == 0.1
    expected = ("t2r", 128) if kind.endswith("t2r") else ("hedgehog", 64)
    made = student.feature_map
    assert (made.name, made.feature_dim, made.init) == (*expected, "kaiming")
    assert made.bias is None  # null is a bias for t2r and none for the others, as the files ask for


@pytest.mark.parametrize("distill", DISTILLS)
@pytest.mark.parametrize("finetune", FINETUNES)
def test_every_named_experiment_is_a_checked_recipe(
    distill: str, finetune: str, plan: Callable[..., ScriptPlan]
) -> None:
    first = plan("transfer", distill=distill, finetune=finetune, eval="eval_alpaca_clean").recipe
    second = plan("finetune", distill=distill, finetune=finetune, eval="eval_alpaca_clean").recipe
    assert (first.transfer is None) == distill.startswith("no_")
    if first.transfer is not None:
        assert first.transfer.xent_weight == (1.0 if "xent1" in distill else 0.0)
        assert (first.transfer.lr, first.transfer.mse_weight) == (0.01, 1000.0)
    assert first.data.seq_len == (2048 if "2048" in distill else 1024)
    if "rpcontig" in distill:
        assert (first.data.path, first.data.packing) == ("redpajama/train.json[50000]", "contiguous")
        assert (first.data.select, first.data.select_rows) == ("esl", 20000)
    lora = second.lora
    assert lora is not None
    assert lora.targets == (("q_proj", "v_proj") if "_qv_" in finetune else ("q_proj", "k_proj", "v_proj", "o_proj"))
    large = finetune.endswith("405b")
    assert (lora.rank, lora.alpha, lora.dropout) == ((4, 8.0, 0.5) if large else (8, 16.0, 0.0))
    assert second.data.path == "yahma/alpaca-cleaned"


def _names(kind: str) -> list[str]:
    folder = CONFIGS / kind
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.glob("*/*.yaml"))


SCALED = [name for name in _names("experiment") if name.startswith("llama3_1_")]
CHUNKED = [name for name in _names("model") if name.startswith("chunked_experimental/")]
"""Names in folders, as the original's scripts give them."""


def test_the_names_in_folders_are_there() -> None:
    assert len(SCALED) == 26
    assert len(CHUNKED) == 6
    for name in (
        "llama3_1_70b/distill_rp_llama_70b_xent0_mse1000_lr1e-2", "llama3_1_70b/finetune_rp2048_llama70b_qv",
        "llama3_1_405b/rp_distill_llama_405b_xent1_mse1000_lr1e-2", "llama3_1_405b/rp_finetune_llama_40b_qv_hparams",
    ):  # fmt: skip
        assert name in SCALED


@pytest.mark.parametrize("name", SCALED)
def test_every_experiment_in_a_folder_is_a_checked_recipe(name: str, plan: Callable[..., ScriptPlan]) -> None:
    tunes = "finetune" in name
    recipe = plan("finetune" if tunes else "transfer", **{"finetune" if tunes else "distill": name}).recipe
    redpajama = "rp" in name
    assert recipe.data.path == ("redpajama/train.json[50000]" if redpajama else "yahma/alpaca-cleaned")
    assert recipe.data.select_rows == (10000 if "rp2048" in name else None)
    stage = recipe.lora if tunes else recipe.transfer
    if stage is None:
        assert "no_distill" in name
        return
    assert (stage.lr, stage.batch_size, stage.restore_best) == (1e-4 if tunes else 1e-2, 1, True)
    if tunes:
        assert recipe.lora is not None
        assert recipe.lora.train_feature_maps == ("no_distill" in name)
        assert recipe.lora.targets == (("q_proj", "v_proj") if len(recipe.lora.targets) == 2 else LoraConfig().targets)


@pytest.mark.parametrize("name", [name for name in _names("model") if not name.startswith("attention/")])
def test_every_model_in_a_folder_is_that_outside_it(name: str, plan: Callable[..., ScriptPlan]) -> None:
    plain = name.rpartition("/")[2].replace("distill_long_", "distill_").replace("llama_3_8b", "llama3_8b")
    here, there = plan(model=name).recipe, plan(model=plain).recipe
    assert (here.model, here.student) == (there.model, there.student)


def test_the_baseline_trains_feature_maps(plan: Callable[..., ScriptPlan]) -> None:
    none = "no_distill_alpaca_clean"
    made = plan("finetune", distill=none, finetune="finetune_lora_fqkvo_alpaca_clean")
    assert made.recipe.lora is not None
    assert made.recipe.lora.train_feature_maps
    assert not any("stay as they begin" in remark for remark in made.remarks)
    assert any("stay as they begin" in remark for remark in plan("finetune", distill=none).remarks)


def test_softmax_base_models_are_refused(plan: Callable[..., ScriptPlan]) -> None:
    for name in ("base_llama3_1_8b", "base_llama3_1_70b"):
        rope = read_config("model", name, [CONFIGS]).at("model.rope_scaling")
        assert rope == {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
        with pytest.raises(UserError, match=r"softmax.*nothing to transfer to"):
            plan(model=name)


def test_the_default_run_is_the_built_in_recipe(plan: Callable[..., ScriptPlan]) -> None:
    """With --lk_zero_init, as every documented command has it, both entry points lead to the same numbers."""
    old = plan("finetune", "--lk_zero_init").recipe
    new = load_recipe("lolcats_llama3_1_8b")
    assert old.student == new.student
    assert old.data == new.data
    assert old.transfer == new.transfer
    assert old.lora == new.lora
    assert old.model.path == new.model.path


@pytest.mark.parametrize(
    ("flags", "path", "value"),
    [
        ("--lk_zero_init", "student.feature_map.init", "identity"),
        ("--attention_type lolcats_llama_window_sw", "student.name", "sliding"),
        ("--attention_type linear", "student.name", "linear"),
        ("--tie_qk_kernels", "student.tied", True),
        ("--pretrained_model_name_or_path other/model", "model.path", "other/model"),
        ("--pure_bf16", "model.dtype", "bfloat16"),
        ("--no_cuda", "model.device", "cpu"),
        ("--lr 0.5", "transfer.lr", 0.5),
        ("--lr 0.5", "lora.lr", 1e-4),
        ("--finetune_lr 0.25", "lora.lr", 0.25),
        ("--weight_decay 0.1", "lora.weight_decay", 0.1),
        ("--scheduler cosine_warmup", "transfer.schedule", "cosine"),
        ("--scheduler none", "lora.schedule", "constant"),
        ("--gradient_accumulation_steps 3", "lora.accumulation", 3),
        ("--num_train_epochs 1", "transfer.epochs", 1.0),
        ("--max_steps 7", "transfer.max_steps", 7),
        ("--num_train_steps 9", "lora.max_steps", 2),
        ("--max_steps 1 --num_train_steps 90", "lora.max_steps", 1),
        ("--eval_steps 5", "lora.eval_every", 5),
        ("--max_eval_batches 3", "transfer.eval_batches", 3),
        ("--max_eval_batches 3", "lora.eval_batches", 3),
        ("--max_steps 7 --max_finetune_steps 9", "transfer.max_steps", 7),
        ("--max_steps 7 --max_finetune_steps 9", "lora.max_steps", 9),
        ("--lk_normal_init", "student.feature_map.init", "normal"),
        ("--window_size 32", "student.window", 32),
        ("--batch_size 2", "transfer.batch_size", 2),
        ("--dataset_chunk_size 512", "data.seq_len", 512),
        ("", "lora.gradient_checkpointing", True),
        ("--no_peft_grad_ckpt", "lora.gradient_checkpointing", False),
        ("--no_peft_grad_ckpt --fsdp_activation_checkpointing", "lora.gradient_checkpointing", True),
        ("--finetune_attn_mlps", "lora.train_feature_maps", True),
        ("", "parallel.shard", "none"),
        ("--enable_fsdp", "parallel.shard", "full"),
        ("--fsdp_cpu_offload", "parallel.cpu_offload", True),
        ("--seed 4", "run.seed", 4),
        ("", "run.trackers", ()),
        ("--project_name cats", "run.project", "cats"),
    ],
)  # fmt: skip
def test_a_flag_sets_its_field(flags: str, path: str, value: object, plan: Callable[..., ScriptPlan]) -> None:
    found: Any = plan("finetune", flags).recipe
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value


def test_the_skip_connection_starts_as_the_identity(plan: Callable[..., ScriptPlan]) -> None:
    made = plan(line="--lk_skip_connection --lk_zero_init").recipe.student.feature_map
    assert (made.skip, made.init) == (True, "identity")
    assert plan(line="--lk_skip_connection").recipe.student.feature_map.init == "kaiming"


def test_weights_and_biases_need_an_entity(plan: Callable[..., ScriptPlan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_ENTITY", "nobody")
    assert plan(line="--wandb_entity us").recipe.run.trackers == ("wandb",)
    assert scripts.os.environ["WANDB_ENTITY"] == "us"
    assert plan(line="--wandb_entity us --no_wandb").recipe.run.trackers == ()


def test_the_token_reaches_the_hub_and_nothing_else(
    plan: Callable[..., ScriptPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import get_token

    monkeypatch.setenv("HF_TOKEN", "another")
    made = plan(line="--huggingface_token hf_secret")
    assert get_token() == "hf_secret"
    assert "hf_secret" not in str(made)


def test_flags_without_effect_are_named_in_one_warning(plan: Callable[..., ScriptPlan]) -> None:
    every = [
        f"--{flag.name}" + {"switch": "", "int": " 3", "float": " 0.5", "str": " x"}[flag.kind]
        for flag in FLAGS
        if flag.ignored
    ]
    made = plan(line=" ".join(every))
    assert made.recipe == plan().recipe
    (remark,) = made.remarks
    for flag in FLAGS:
        assert (f"--{flag.name}" in remark) == flag.ignored


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--optim sgd", ("'sgd'", "adamw_torch")),
        ("--scheduler timm_cosine", ("'timm_cosine'", "cosine")),
        ("--attention_type lolcats_llama_window_tkk", ("did you mean lolcats_llama_window_tk?",)),
        ("--learned_kernel untied_head_adapter", ("hidden_dim",)),
        ("--learned_kernel einsum", ("'einsum'", "untied_head_einsum")),
        ("--load_finetune_checkpoint x", ("trenchcoat eval",)),
        ("--load_distill_checkpoint x", ("distill_llama_finetune.py", "continues by itself")),
        ("--data_dir /nowhere/at/all", ("--data_dir /nowhere/at/all", "no such file")),
        ("--layers_per_model 3", ("--layers_per_model 3", "all layers", "--enable_fsdp")),
        ("--lr -1", ("transfer.lr", "-1")),
        ("--lk_zero_init --lk_normal_init", ("exclude each other",)),
        ("--attention_type lolcats_llama --window_size 8", ("--window_size", "has no window")),
        ("--gradient_accumulation_steps 0", ("transfer.accumulation", "at least 1")),
        ("--dataset_chunk_size 0", ("at least", "got 0")),
        ("--max_step 3", ("'--max_step'", "did you mean --max_steps?")),
        ("--max_steps many", ("--max_steps", "'many'")),
        ("--distill_config distil_alpaca_clean_xent0_mse1000_lr1e-2", ("did you mean", ALPACA)),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_the_fix(
    line: str, words: tuple[str, ...], plan: Callable[..., ScriptPlan]
) -> None:
    with pytest.raises(UserError) as refused:
        plan(line=line)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


def test_the_configurations_must_be_named() -> None:
    with pytest.raises(UserError, match=r"--model_config and --distill_config must be given"):
        scripts.plan_of("transfer", [], CONFIGS)


def test_block_flags_that_mean_all_layers_are_accepted(plan: Callable[..., ScriptPlan], tiny_model_dir: Path) -> None:
    from trenchcoat.cli.compat.start import base_config, check_layers

    base = base_config(str(tiny_model_dir))
    check_layers({"layers_per_model": 2, "layers_limit_min": 0, "layers_limit_max": 1}, base)
    for flags in ({"layers_per_model": 1}, {"layers_limit_min": 1}, {"layers_limit_max": 0}):
        with pytest.raises(UserError, match="the model has 2"):
            check_layers(flags, base)


def test_the_same_arguments_name_the_same_run(plan: Callable[..., ScriptPlan]) -> None:
    for line in (
        "",
        "--lr 0.1 --lk_zero_init --seed 3",
        "--wandb_entity us --verbose --load_distill_checkpoint default",
    ):
        first, second = plan("transfer", line), plan("finetune", line)
        assert first.recipe.run.dir == second.recipe.run.dir == str(second.transfer_dir)
        assert first.recipe == second.recipe
    folders = {plan("transfer", f"--seed {seed} --replicate {r}").recipe.run.dir for seed in (0, 1) for r in (0, 1)}
    assert len(folders) == 4


def test_stage_2_has_its_own_folder_where_stage_1_can_be_shared(plan: Callable[..., ScriptPlan]) -> None:
    home = plan("transfer").recipe.run.dir
    folders = [
        plan("finetune", line) for line in ("", "--finetune_lr 0.1", "--finetune_lr 0.2", "--finetune_attn_mlps")
    ]
    folders.append(plan("finetune", finetune="finetune_lora_qkvo_rpcontig1024_dcs1024"))
    assert len({one.recipe.run.dir for one in folders}) == 5
    assert {str(one.transfer_dir) for one in folders[:-1]} == {home}


# Users' own files

OLD_MODEL = """
name: llama
model:
  pretrained_model_name_or_path: somewhere/llama
  cache_dir: /models
  return_dict: true
  load_in_8bit: false
  load_in_4bit: true
  device_map: auto
  low_cpu_mem_usage: true
  torch_dtype: bfloat16
  attn_implementation: sdpa
  rope_theta: 10000.0
attention:
  attention_type: lolcats_llama_window_sw
  state_chunk_len: 512
  window_size: 32
  affine_attention_factors: true
  init_window_factor: 0
  train_window_factor: true
  train_attention_weights: false
  feature_map: exp_dim
  feature_map_kwargs: {eps: 1e-12, mlp: null, fullspace: false}
  layer_idx: null
  learned_kernel: untied_head_adapter
  learned_kernel_kwargs: {feature_dim: 48, hidden_dim: 16}
  tie_qk_kernels: true
  train_qk: false
  softmax_attentions: [1, 3]
"""


def test_an_old_style_model_file_is_read(plan: Callable[..., ScriptPlan], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(OLD_MODEL)
    made = plan(model=str(tmp_path / "mine.yaml"))
    model, student = made.recipe.model, made.recipe.student
    assert (model.path, model.dtype, model.quantize) == ("somewhere/llama", "bfloat16", "nf4")
    assert model.attention == "sdpa"
    assert (student.name, student.window, student.affine, student.mix_init) == ("sliding", 32, True, 0.5)
    assert (student.tied, student.keep_softmax) == (True, (1, 3))
    assert student.feature_map == FeatureMapConfig(name="exp_half", feature_dim=48, adapter_dim=16, init="identity")
    assert made.remarks == (f"accepted, but without effect here: {tmp_path}/mine.yaml: model.cache_dir",)


OLD_EXPERIMENT = """
dataset:
  name: redpajama_sample
  dataset_config:
    train_data: ["sub/train.json[50]"]
    eval_data: [sub/held_out.json]
    min_length: 5
    max_length: 900
    chunk_size: 256
  preprocess_config: null
dataloader: {batch_size: 2, num_workers: 2, drop_last: false, pin_memory: true}
optimizer: {optim: adamw_torch_fused, lr: 1e-3, weight_decay: 0.1, max_optimizer_steps: 40}
lr_scheduler: {lr_scheduler_type: cosine_warmup, num_warmup_steps: 5}
trainer:
  name: distill_attention_xent_mse
  mse_factor: 10
  xent_factor: 2
  num_train_epochs: 3
  gradient_accumulation_steps: 4
  eval_steps: 6
  eval_strategy: steps
  max_eval_batches: 9
fsdp: {gradient_clipping: false}
"""


def test_an_old_style_experiment_file_is_read(plan: Callable[..., ScriptPlan], tmp_path: Path) -> None:
    (tmp_path / "configs" / "experiment").mkdir(parents=True)
    (tmp_path / "configs" / "experiment" / "mine.yaml").write_text(OLD_EXPERIMENT)
    (tmp_path / "data" / "sub").mkdir(parents=True)
    for name in ("train", "held_out"):
        (tmp_path / "data" / "sub" / f"{name}.json").write_text(json.dumps([{"text": "x"}]))
    recipe = plan(line="--data_dir data", distill="mine").recipe
    assert recipe.transfer == TransferConfig(
        lr=1e-3, weight_decay=0.1, max_steps=40, schedule="cosine", warmup_steps=5, min_lr=0.0, mse_weight=10.0,
        xent_weight=2.0, epochs=3.0, accumulation=4, batch_size=2, eval_every=6, eval_batches=9, clip=None,
    )  # fmt: skip
    data = recipe.data
    assert (data.path, data.validation_path) == ("data/sub/train.json[50]", "data/sub/held_out.json")
    assert (data.min_tokens, data.max_tokens, data.seq_len, data.packing) == (5, 900, 256, "across")
    with pytest.raises(UserError, match=r"holds no sub/train.json"):
        plan(line="--data_dir configs", distill="mine")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("window_size", "windw_size", "unknown key attention.windw_size: did you mean attention.window_size?"),
        ("  tie_qk_kernels: true", "  rope_theta: 3", "did you mean model.rope_theta?"),
        ("load_in_8bit: false", "load_in_8bit: true", "load_in_4bit"),
        ("exp_dim", "exp_dimm", "did you mean exp_dim?"),
        ("window_size: 32", "window_size: wide", "student.window must be a whole number"),
        ("name: llama\n", "base: mine\n", "its own base"),
        ("name: llama\n", "- a\n", "mine.yaml"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_are_answered_in_one_line(
    old: str, new: str, words: str, plan: Callable[..., ScriptPlan], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(OLD_MODEL.replace(old, new, 1))
    with pytest.raises(UserError) as refused:
        plan(model=str(tmp_path / "mine.yaml"))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_lora_files_say_which_weights_learn(plan: Callable[..., ScriptPlan], tmp_path: Path) -> None:
    (tmp_path / "ft.yaml").write_text(
        f"base: {FINETUNES[0]}\nfinetune: {{trainable_weights: [feature_map_q.mlp.layer, window_factors]}}\n"
    )
    lora = plan("finetune", finetune=str(tmp_path / "ft.yaml")).recipe.lora
    assert lora == LoraConfig(loss="ce", train_feature_maps=True, gradient_checkpointing=True)
    (tmp_path / "ft.yaml").write_text(f"base: {FINETUNES[0]}\nfinetune: {{method: prefix}}\n")
    with pytest.raises(UserError, match="'prefix'; only lora"):
        plan("finetune", finetune=str(tmp_path / "ft.yaml"))
