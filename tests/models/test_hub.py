"""Adapter folders, merged folders, `load`, and the classes that `import trenchcoat` registers."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import trenchcoat
from tiny_families import FAMILIES, logits, tiny_model, tokens
from trenchcoat.config import FeatureMapConfig, LoraConfig, ModelConfig, StudentConfig, UserError
from trenchcoat.models import auto, hub
from trenchcoat.models.attach import attach_students, set_mode, student_config, students_of
from trenchcoat.models.hub import adapter_state
from trenchcoat.models.loading import load_model
from trenchcoat.models.lora import add_lora
from trenchcoat.runtime.files import CorruptFileError
from trenchcoat.runtime.sealed import write_sealed

SMALL = StudentConfig(window=4, keep_softmax=(1,), feature_map=FeatureMapConfig(feature_dim=6))
LORA = LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "v_proj"))
REPOSITORY = Path(__file__).parents[2]


def learned(base: Path, *, lora: bool = True) -> tuple[Any, ModelConfig]:
    cfg = ModelConfig(path=str(base), device="cpu", dtype="float32")
    model, _ = load_model(cfg)
    attach_students(model, SMALL)
    if lora:
        add_lora(model, LORA)
    set_mode(model, "student")
    with torch.no_grad():
        for parameter in adapter_state(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, cfg


@pytest.fixture
def adapter(tiny_model_dir: Path, tmp_path: Path) -> tuple[Path, Any]:
    model, cfg = learned(tiny_model_dir)
    hub.save_adapter(model, tmp_path / "adapter", base=cfg, lora=LORA)
    return tmp_path / "adapter", model


def in_a_process_of_its_own(code: str, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# Adapter folders


def test_an_adapter_folder_round_trips(adapter: tuple[Path, Any]) -> None:
    folder, model = adapter
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.safetensors", "trenchcoat.json"]
    loaded, tokenizer = trenchcoat.load(folder, device="cpu")
    ids = tokens(2, 30)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert student_config(loaded) == SMALL
    assert tokenizer.decode(tokenizer("coat").input_ids) == "coat"
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_loaded_adapter_can_be_saved_again(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = adapter
    loaded, _ = hub.load(folder, device="cpu")
    hub.save_adapter(loaded, tmp_path / "again")
    again, _ = hub.load(tmp_path / "again", device="cpu")
    ids = tokens(2, 30)
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_an_adapter_without_lora(tiny_model_dir: Path, tmp_path: Path) -> None:
    model, cfg = learned(tiny_model_dir, lora=False)
    hub.save_adapter(model, tmp_path, base=cfg, lora=LORA)
    assert json.loads((tmp_path / "trenchcoat.json").read_text())["lora"] is None
    ids = tokens(2, 30)
    assert torch.equal(logits(hub.load(tmp_path, device="cpu")[0], ids), logits(model, ids))


def test_a_run_folder_loads_its_adapter(adapter: tuple[Path, Any]) -> None:
    folder, model = adapter
    loaded, _ = hub.load(folder.parent, device="cpu")
    assert torch.equal(logits(loaded, tokens(1, 9)), logits(model, tokens(1, 9)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_recognises_the_base(adapter: tuple[Path, Any], dtype: str) -> None:
    model, _ = hub.load(adapter[0], device="cpu", dtype=dtype)
    assert model.model.embed_tokens.weight.dtype == getattr(torch, dtype)
    assert {p.dtype for p in adapter_state(model).values()} == {torch.float32}


def test_another_base_model_is_refused(adapter: tuple[Path, Any], other_model_dir: Path, tmp_path: Path) -> None:
    folder, _ = adapter
    with pytest.raises(UserError, match="the sizes agree, the weights do not"):
        hub.load(folder, device="cpu", base=str(other_model_dir))
    wider = tmp_path / "wider"
    shutil.copytree(other_model_dir, wider)
    tiny_model("qwen2").save_pretrained(wider)
    with pytest.raises(UserError, match="model_type is 'qwen2' there, the adapter needs 'llama'"):
        hub.load(folder, device="cpu", base=str(wider))


def test_a_base_that_moved_is_given_explicitly(tiny_model_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    model, cfg = learned(tmp_path / "base")
    hub.save_adapter(model, tmp_path / "adapter", base=cfg, lora=LORA)
    (tmp_path / "base").rename(moved)
    with pytest.raises(UserError, match=r"cannot be loaded.*base=\.\.\."):
        hub.load(tmp_path / "adapter", device="cpu")
    loaded, _ = hub.load(tmp_path / "adapter", device="cpu", base=str(moved))
    assert torch.equal(logits(loaded, tokens(1, 9)), logits(model, tokens(1, 9)))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "trenchcoat.json"
    write_sealed(path, {**json.loads(path.read_text()), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"version": None}, "version None"),
        ({"base": None}, "lacks `base`"),
        ({"student": {"name": "terrace", "magic": 1}}, "another version.*magic"),
        ({"student": {"name": "terrase"}}, "did you mean terrace"),
        ({"student": {"name": "terrace", "window": 4}}, "does not belong to this model and its settings"),
        ({"lora": None}, "not of this model, e.g. .*lora_A"),
    ],
)
def test_adapters_that_do_not_fit(adapter: tuple[Path, Any], changes: dict[str, Any], message: str) -> None:
    edit(adapter[0], **changes)
    with pytest.raises(UserError, match=message):
        hub.load(adapter[0], device="cpu")


def test_a_damaged_adapter_is_named(adapter: tuple[Path, Any]) -> None:
    file = adapter[0] / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"adapter\.safetensors"):
        hub.load(adapter[0], device="cpu")


def test_saving_an_adapter_of_unknown_origin_asks_for_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    model, cfg = learned(tiny_model_dir)
    with pytest.raises(UserError, match="base=ModelConfig"):
        hub.save_adapter(model, tmp_path)
    hub.save_adapter(model, tmp_path, base=cfg)
    assert json.loads((tmp_path / "trenchcoat.json").read_text())["lora"]["targets"] == ["q_proj", "v_proj"]


# Merged folders


def test_a_merged_folder_loads_both_ways(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = adapter
    model, tokenizer = hub.load(folder, device="cpu")
    ids, out = tokens(2, 30), tmp_path / "merged"
    expected = logits(model, ids)
    hub.save_merged(model, out, tokenizer)
    loaded, words = hub.load(out, device="cpu")
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=0, atol=5e-5)
    assert words.decode(words("coat").input_ids) == "coat"
    direct = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(direct, ids), logits(loaded, ids))
    assert direct.lm_head.weight is direct.model.embed_tokens.weight
    direct.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, ids), logits(loaded, ids))
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in direct.state_dict().items()}
    settings = json.loads((out / "config.json").read_text())
    assert settings["model_type"] == "linearized_llama"
    assert settings["architectures"] == ["LinearizedLlamaForCausalLM"]
    assert settings["trenchcoat"]["student"]["keep_softmax"] == [1]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_students_stay_float32_beside_bfloat16_weights(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    attach_students(model, SMALL)
    set_mode(model, "student")
    hub.save_merged(model, tmp_path / "merged")
    for dtype in ("auto", torch.bfloat16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
        for name, parameter in loaded.named_parameters():
            assert parameter.dtype == (torch.float32 if ".student." in name else torch.bfloat16), name
    assert torch.equal(logits(loaded, tokens(1, 20)), logits(model, tokens(1, 20)))


def test_a_merged_model_in_a_fresh_process(tmp_path: Path) -> None:
    """Here trenchcoat is imported before Transformers; in this test's own process it is imported after."""
    model, ids = tiny_model("mixtral"), tokens(1, 20)
    attach_students(model, SMALL)
    set_mode(model, "student")
    hub.save_merged(model, tmp_path)
    code = (
        "import sys, trenchcoat\nimport torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = torch.tensor([[int(i) for i in sys.argv[2].split()]])\n"
        "print(type(model).__name__, model(ids).logits.double().sum().item())\n"
    )
    expected = logits(model, ids).double().sum().item()
    row = " ".join(map(str, ids[0].tolist()))
    name, total = in_a_process_of_its_own(code, tmp_path, row).split()
    assert name == "LinearizedMixtralForCausalLM"
    assert float(total) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_base_checkpoint_loads_with_our_config(family: str, tmp_path: Path) -> None:
    """Students that are in no checkpoint are initialized, not left uninitialized; experts are found."""
    base, ids = tiny_model(family), tokens(1, 20)
    base.save_pretrained(tmp_path)
    config = auto.linearized_config(AutoConfig.from_pretrained(tmp_path), SMALL)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    attach_students(base, SMALL)
    set_mode(base, "student")
    assert torch.equal(logits(model, ids), logits(base, ids))
    set_mode(model, "teacher")
    set_mode(base, "teacher")
    assert torch.equal(logits(model, ids), logits(base, ids))


def test_a_merged_folder_that_lacks_tensors_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    model, _ = learned(tiny_model_dir, lora=False)
    hub.save_merged(model, tmp_path / "merged")
    wider = replace(SMALL, feature_map=FeatureMapConfig(name="t2r", feature_dim=6))
    settings = auto.linearized_config(model.config, wider).trenchcoat
    config = tmp_path / "merged" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "trenchcoat": settings}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_dir / name, tmp_path / "merged")
    with pytest.raises(UserError, match=r"tensors are missing, e\.g\. .*bias"):
        hub.load(tmp_path / "merged", device="cpu")


def test_folders_without_a_linearized_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ordinary 'llama' model"):
        hub.load(tiny_model_dir, device="cpu")
    with pytest.raises(UserError, match="holds no linearized model"):
        hub.load(tmp_path, device="cpu")
    with pytest.raises(UserError, match="no such folder"):
        hub.load(tmp_path / "absent", device="cpu")


# Classes


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_classes(family: str) -> None:
    config = auto.linearized_config(tiny_model(family).config, SMALL)
    assert config.model_type == f"linearized_{family}"
    assert type(config) is auto.config_class(family)
    kind = auto.model_class(family)
    assert issubclass(kind, AutoModelForCausalLM._model_mapping[type(config).__mro__[1]])
    assert pickle.loads(pickle.dumps(config)).trenchcoat == config.trenchcoat
    assert kind is auto.model_class(family)


def test_a_linearized_model_from_its_config_alone() -> None:
    config = auto.linearized_config(tiny_model().config, SMALL)
    first = AutoModelForCausalLM.from_config(config)
    second = AutoModelForCausalLM.from_config(first.config)
    assert [list(students_of(m)) for m in (first, second)] == [[0], [0]]
    assert torch.isfinite(logits(first, tokens(1, 20))).all()
    assert torch.isfinite(logits(second, tokens(1, 20))).all()


UNPICKLE = """
import pickle, sys
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        found, ids, expected = pickle.load(file)
    if ids is None:
        from transformers import AutoModelForCausalLM
        assert type(AutoModelForCausalLM.from_config(found)).__name__ == expected, path
    else:
        assert float((found(input_ids=ids, use_cache=False).logits - expected).abs().max()) < 1e-4, path
print("read")
"""


def test_configs_and_models_are_unpickled_in_a_process_that_imported_nothing(tmp_path: Path) -> None:
    """vLLM and others start processes that get their arguments as pickles."""
    for family in ("llama", "gpt_oss", "phi3"):
        model = auto.model_class(family)(auto.linearized_config(tiny_model(family).config, SMALL)).eval()
        ids = tokens(1, 20)
        contents = {"config": (model.config, None, type(model).__name__), "model": (model, ids, logits(model, ids))}
        for name, content in contents.items():
            (tmp_path / f"{family}.{name}").write_bytes(pickle.dumps(content))
    order = ("phi3.model", "llama.config", "llama.model", "gpt_oss.model")
    command = [sys.executable, "-c", UNPICKLE, *(str(tmp_path / name) for name in order)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr


def test_configs_without_or_with_newer_settings_are_refused() -> None:
    config = auto.linearized_config(tiny_model().config, SMALL)
    config.trenchcoat = {**config.trenchcoat, "version": 99}
    with pytest.raises(UserError, match="newer trenchcoat"):
        auto.model_class("llama")(config)
    config.trenchcoat = None
    with pytest.raises(UserError, match="under the key `trenchcoat`"):
        auto.model_class("llama")(config)
    with pytest.raises(UserError, match="no family 'lamma'"):
        auto.config_class("lamma")


def test_importing_the_package_is_cheap() -> None:
    code = "import trenchcoat, sys; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    assert in_a_process_of_its_own(code).strip() == "set()"


def test_an_adapter_of_a_relative_base_opens_from_anywhere(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "models" / "llama")
    monkeypatch.chdir(tmp_path)
    model, _ = learned(Path("models/llama"))
    hub.save_adapter(model, "adapter", base=ModelConfig(path="models/llama"), lora=LORA)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again, _ = hub.load("../adapter", device="cpu")
    hub.save_adapter(again, "copy")
    shutil.move(tmp_path / "models", tmp_path / "moved")
    with pytest.raises(UserError, match=f"{tmp_path}/models/llama.*no such folder.*base="):
        hub.load("copy", device="cpu")
    hub.load("copy", device="cpu", base="../moved/llama")


@pytest.mark.parametrize("path", ["runs/nope", "nope", "a/b/c", "~/nope", "/nope"])
def test_a_path_that_is_not_there_is_called_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for call in (lambda: hub.load(path, device="cpu"), lambda: load_model(ModelConfig(path=path, device="cpu"))):
        with pytest.raises(UserError, match="no such folder") as raised:
            call()
        assert "huggingface.co" not in str(raised.value)


class Killed(BaseException):
    """Stands for a kill: nothing below catches it, and nothing is cleaned up."""


def test_an_adapter_is_replaced_as_a_whole_however_the_writer_ends(
    adapter: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = adapter
    before = hub.read_adapter(folder)
    tensors = {name: tensor + 1 for name, tensor in before[0].items()}
    outcomes = []
    for moves in range(6):
        again = tmp_path / f"again-{moves}"
        shutil.copytree(folder, again)
        left = [moves]
        real = os.replace

        def replace_or_die(source: Any, target: Any, left: list[int] = left, real: Any = real) -> None:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            real(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replace_or_die)
            with suppress(Killed):
                hub.write_adapter(again, tensors, {**before[1], "lora": None})
        found = hub.read_adapter(again)
        new = torch.equal(found[0]["model.layers.0.self_attn.student.mix_H"],
                          tensors["model.layers.0.self_attn.student.mix_H"])  # fmt: skip
        assert (found[1]["lora"] is None) == new
        assert hub.read_meta(again) == found[1]
        outcomes.append(new)
        hub.write_adapter(again, tensors, {**before[1], "lora": None})
        assert hub.read_adapter(again)[1]["lora"] is None
        assert sorted(path.name for path in again.iterdir()) == ["adapter.safetensors", "trenchcoat.json"]
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {False, True}


# How a model is loaded


def test_dtypes_by_torch_and_as_stored(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    model, _ = hub.load(adapter[0], device="cpu", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    hub.save_merged(model, tmp_path / "merged", hub.load(adapter[0], device="cpu")[1])
    assert hub.load(tmp_path / "merged", device="cpu")[0].dtype == torch.float32
    assert hub.load(tmp_path / "merged", device="cpu", dtype="stored")[0].dtype == torch.bfloat16
    assert hub.load(adapter[0], device="cpu", dtype="stored")[0].dtype == torch.float32
    for dtype in ("bf16", torch.int8):
        with pytest.raises(UserError, match="expected auto, "):
            hub.load(adapter[0], device="cpu", dtype=dtype)


def test_a_device_map_takes_the_place_of_the_device(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    model, tokenizer = hub.load(adapter[0], device="cpu")
    hub.save_merged(model, tmp_path / "merged", tokenizer)
    for place in (adapter[0], tmp_path / "merged"):
        mapped, _ = hub.load(place, device_map={"": "cpu"})
        torch.testing.assert_close(logits(mapped, tokens(1, 9)), logits(model, tokens(1, 9)), rtol=0, atol=5e-5)
        with pytest.raises(UserError, match="both say where the weights go"):
            hub.load(place, device="cpu", device_map="auto")


ON_DISK = {
    "model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
    "model.layers.0": "cpu", "model.layers.1": "disk",
}  # fmt: skip


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "with LoRA"])
def test_a_complete_folder_runs_with_layers_on_disk(merge: bool, adapter: tuple[Path, Any], tmp_path: Path) -> None:
    model, tokenizer = hub.load(adapter[0], device="cpu")
    if merge:
        hub.save_merged(model, tmp_path / "whole", tokenizer)
    else:
        model.save_pretrained(tmp_path / "whole")
    whole, _ = hub.load(tmp_path / "whole", device="cpu")
    away, _ = hub.load(tmp_path / "whole", device_map=ON_DISK)
    ids = tokens(2, 30)
    assert torch.equal(logits(away, ids), logits(whole, ids))
    texts = [one.generate(ids, max_new_tokens=12, do_sample=False) for one in (away, whole)]
    assert torch.equal(*texts)
    assert all(p.is_meta for p in away.model.layers[1].mlp.parameters())  # it is fetched for each call only
    with pytest.raises(UserError, match="sharded or offloaded"):
        away.save_pretrained(tmp_path / "again")


def test_an_adapter_is_not_put_over_a_base_on_disk(adapter: tuple[Path, Any]) -> None:
    with pytest.raises(UserError, match=r"off their device \(model\.layers\.1\..*export DIR --merge"):
        hub.load(adapter[0], device_map=ON_DISK)


def test_a_folder_without_a_tokenizer_is_said_to_be_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    model, _ = learned(tiny_model_dir)
    model.save_pretrained(tmp_path / "folder")
    with pytest.raises(UserError, match=r"has no tokenizer that can be loaded .*tokenizer\.save_pretrained"):
        hub.load(tmp_path / "folder", device="cpu")


def test_a_revision_is_of_the_hub(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    model, tokenizer = hub.load(adapter[0], device="cpu")
    hub.save_merged(model, tmp_path / "merged", tokenizer)
    for place in (adapter[0], tmp_path / "merged"):
        with pytest.raises(UserError, match=r"revision='v1' is of a hub id, and .* is a folder"):
            hub.load(place, device="cpu", revision="v1")
