"""Checkpoints of the original LoLCATs code: imported, equal to its formula, written back, and refused when invalid.

The files are made here by hand in the original's format. Its attention is written out below in float64, with its masks.
"""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hub_stand_in import hub_stand_in, use_hub
from trenchcoat.cli import app as cli
from trenchcoat.config import FeatureMapConfig, LoraConfig, ModelConfig, StudentConfig, UserError
from trenchcoat.models import hub
from trenchcoat.models.attach import attach_students, set_mode, student_config
from trenchcoat.models.hub import adapter_state
from trenchcoat.models.lolcats import checkpoints
from trenchcoat.models.lolcats.files import PUBLISHED
from trenchcoat.models.lora import add_lora

HEADS, GROUPS, DIM, COLUMNS, LAYERS, WINDOW = 4, 2, 8, 6, 2, 8
State = dict[str, Tensor]


# The original's files and its function, by hand


def maps_state(*, prefix: str = "model.", windowed: bool = True, bias: bool = False, seed: int = 0) -> State:
    random = torch.Generator().manual_seed(seed)
    state: State = {}
    for layer in range(LAYERS):
        path = f"{prefix}layers.{layer}.self_attn"
        for side in "qk":
            weight = torch.randn(HEADS, DIM, COLUMNS, generator=random)
            state[f"{path}.feature_map_{side}.mlp.layer"] = weight
            if bias:
                state[f"{path}.feature_map_{side}.mlp.bias"] = torch.randn(1, HEADS, 1, 1, generator=random)
        if windowed:
            state[f"{path}.window_factors"] = torch.randn(1, HEADS, 1, 1, generator=random)
    return state


def lora_state(*, rank: int = 2, targets: str = "qv", prefix: str = "base_model.model.model.") -> State:
    random = torch.Generator().manual_seed(7)
    outputs = {"q": 32, "k": 16, "v": 16, "o": 32}
    state: State = {}
    for layer in range(LAYERS):
        for target in targets:
            path = f"{prefix}layers.{layer}.self_attn.{target}_proj"
            state[f"{path}.lora_A.default.weight"] = 0.3 * torch.randn(rank, 32, generator=random)
            state[f"{path}.lora_B.default.weight"] = 0.3 * torch.randn(outputs[target], rank, generator=random)
    return state


def features(x: Tensor, layer: Tensor, *, kind: str, bias: Tensor | float, skip: bool, fullspace: bool) -> Tensor:
    u = torch.einsum("hdf,bhld->bhlf", layer, x) + bias
    u = x + u if skip else u
    if kind == "relu":
        return u.relu().clamp(min=1e-12)
    if kind == "exp_dim":
        up, down = (u - u.amax(-1, keepdim=True)).exp(), (u.amin(-1, keepdim=True) - u).exp()
    else:
        up, down = u.softmax(-1), (-u).softmax(-1)
    return (torch.cat([up, down], -1) if fullspace else up).clamp(min=1e-12)


def original_masks(kind: str, length: int, window: int) -> tuple[Tensor, Tensor]:
    """(near, far) as the original lays them over `length` queries and keys."""
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    causal = key <= query
    if kind == "linear":
        return torch.zeros_like(causal), causal
    if kind == "sliding":
        return causal & (query - key < window), query - key >= window
    chunks = math.ceil(length / window)
    chunk = (torch.arange(length) + chunks * window - length) // window  # the last chunk ends where the input ends
    before = (chunk[:, None] - 1) % chunks == chunk[None, :]
    count = (chunk[:, None] == chunk[None, :]).int() + before.int()  # 2 everywhere in an input of one chunk
    return causal & (count != 0), causal & (count != 1)


class Original:
    """The original's model on our tiny Llama: its attention in float64, everything else the model's own."""

    def __init__(self, base: Path, maps: State, lora: State | None = None, *, attention: str = "terrace",
                 feature_map: str = "softmax_dim", affine: bool = False, skip: bool = False, fullspace: bool = True,
                 window: int = WINDOW, alpha: float = 0.0) -> None:  # fmt: skip
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, attn_implementation="eager").eval()
        self.maps = {name.partition("layers.")[2]: t.double() for name, t in maps.items()}
        self.attention, self.affine, self.window = attention, affine, window
        self.phi = {"kind": feature_map, "skip": skip, "fullspace": fullspace}
        for name, matrix in (lora or {}).items():
            if ".lora_A." in name:
                other = (lora or {})[name.replace("lora_A", "lora_B")]
                module = self.model.get_submodule(name.removeprefix("base_model.model.").partition(".lora_A")[0])
                module.weight.data += alpha / matrix.shape[0] * other.double() @ matrix.double()
        for index, layer in enumerate(self.model.model.layers):
            layer.self_attn.forward = self._forward(index, layer.self_attn)

    def _map(self, index: int, side: str, x: Tensor) -> Tensor:
        name = f"{index}.self_attn.feature_map_{side}.mlp"
        return features(x, self.maps[f"{name}.layer"], bias=self.maps.get(f"{name}.bias", 0.0), **self.phi)

    def _forward(self, index: int, attn: Any) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any) -> Any:
            rows, length = hidden_states.shape[:2]
            q, k, v = (
                p(hidden_states).view(rows, length, -1, DIM).transpose(1, 2)
                for p in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
            k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
            near, far = original_masks(self.attention, length, self.window)
            a_far = (self._map(index, "q", q) @ self._map(index, "k", k).mT).masked_fill(~far, 0.0)
            a_near, tiny = torch.zeros_like(a_far), 1e-12
            if self.attention != "linear":
                g = self.maps[f"{index}.self_attn.window_factors"].sigmoid()
                scores = (q @ k.mT * DIM**-0.5).masked_fill(~near, -1e8)
                a_near, tiny = g * (scores - scores.amax(-1, keepdim=True)).exp(), 0.0
                a_far = a_far * (1 - g) if self.affine else a_far
            a = a_near + a_far
            y = (a @ v) / (a.sum(-1, keepdim=True) + tiny)
            return attn.o_proj(y.transpose(1, 2).reshape(rows, length, -1)), None

        return forward

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def saved(path: Path, state: Any, *, nested: bool = True) -> Path:
    torch.save({"model_state_dict": state, "step": 3, "eval/loss": 0.5} if nested else state, path)
    return path


def imported(folder: Path, base: Path, maps: State, lora: State | None = None, **asked: Any) -> Path:
    """The adapter folder of these states; a window of 8 unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "adapter"
    lora_file = None if lora is None else saved(folder / "l.pt", lora)
    asked = {"window": WINDOW, **asked}
    checkpoints.import_checkpoint(saved(folder / "m.pt", maps), lora_file, str(base), out, checkpoints.Asked(**asked))
    return out


def our_logits(adapter: Path, ids: Tensor) -> Tensor:
    """In float64: the students' parameters are float32 numbers, and so exact there."""
    model, _ = hub.load(adapter, device="cpu", dtype="float32")
    with torch.no_grad():
        result: Tensor = model.double()(input_ids=ids, use_cache=False).logits
    return result


def token_ids(length: int, rows: int = 2) -> Tensor:
    return torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(length))


# One function


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: (state, the user's settings, the original's configuration)
    "terrace": ({}, {}, {}),
    "terrace, its own word": ({}, {"attention": "lolcats_llama_window_tk"}, {}),
    "sliding": ({}, {"attention": "sliding"}, {"attention": "sliding"}),
    "linear": ({"windowed": False}, {}, {"attention": "linear"}),
    "t2r": ({"windowed": False, "bias": True}, {}, {"attention": "linear", "feature_map": "relu"}),
    "affine": ({}, {"affine": True}, {"affine": True}),
    "exp": ({}, {"feature_map": "exp_dim"}, {"feature_map": "exp_dim"}),
    "half": ({}, {"feature_map": "hedgehog_half"}, {"fullspace": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_originals_formula(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """In float64 on both sides, where round-off is about 1e-13: agreement to 1e-9 shows that it is the same formula."""
    state, said, theirs = CASES[name]
    maps, lora = maps_state(**state), lora_state(rank=2, targets="qkvo")
    adapter = imported(tmp_path, tiny_model_dir, maps, lora, **said)
    original = Original(tiny_model_dir, maps, lora, alpha=4.0, **theirs)
    for length in (2 * WINDOW, 3 * WINDOW, 8 * WINDOW):
        ids = token_ids(length)
        torch.testing.assert_close(our_logits(adapter, ids), original.logits(ids), rtol=0, atol=1e-9)


def test_a_skip_connection(tiny_model_dir: Path, tmp_path: Path) -> None:
    maps = {n: (t if "window" in n else torch.randn(HEADS, DIM, DIM)) for n, t in maps_state().items()}
    adapter = imported(tmp_path, tiny_model_dir, maps, skip=True)
    ids = token_ids(4 * WINDOW)
    expected = Original(tiny_model_dir, maps, skip=True).logits(ids)
    torch.testing.assert_close(our_logits(adapter, ids), expected, rtol=0, atol=1e-9)


def test_where_the_original_differs_is_what_the_document_says(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Its chunks end with the input, and up to W tokens its far part has every key too: other logits there only."""
    maps = maps_state()
    adapter, original = imported(tmp_path, tiny_model_dir, maps), Original(tiny_model_dir, maps)

    def differs(length: int) -> bool:
        ids = token_ids(length)
        return bool((our_logits(adapter, ids) - original.logits(ids)).abs().max() > 1e-3)

    assert [n for n in (WINDOW, 2 * WINDOW, 2 * WINDOW + 3, 3 * WINDOW) if differs(n)] == [WINDOW, 2 * WINDOW + 3]
    ids = token_ids(4 * WINDOW)
    whole, prefix = original.logits(ids), original.logits(ids[:, :-3])
    assert (whole[:, :-3] - prefix).abs().max() > 1e-3, "the original's outputs of a prefix change with what follows"


# Forms of the files


@pytest.mark.parametrize("prefix", ["model.", "model.model.", "base_model.model.model."])
@pytest.mark.parametrize("nested", [True, False])
def test_prefixes_and_nesting(prefix: str, nested: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    plain = imported(tmp_path / "plain", tiny_model_dir, maps_state())
    file = saved(tmp_path / "m.pt", maps_state(prefix=prefix), nested=nested)
    out = tmp_path / "out"
    checkpoints.import_checkpoint(file, None, str(tiny_model_dir), out, checkpoints.Asked(window=WINDOW))
    assert (out / "adapter.safetensors").read_bytes() == (plain / "adapter.safetensors").read_bytes()


def test_maps_and_lora_in_one_file_and_bfloat16(tiny_model_dir: Path, tmp_path: Path) -> None:
    state = {name: t.bfloat16() for name, t in {**maps_state(), **lora_state()}.items()}
    adapter = imported(tmp_path, tiny_model_dir, state)
    model, _ = hub.load(adapter, device="cpu")
    learned = adapter_state(model)
    name = "model.layers.1.self_attn.q_proj.lora_A.weight"
    given = state["base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"]
    assert learned[name].dtype == torch.float32
    assert torch.equal(learned[name], given.float())


def test_repositories_of_the_hub_and_buffers_of_the_model(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    whole = {
        **maps_state(), **lora_state(), "model.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }  # fmt: skip
    asked = ["--base", str(tiny_model_dir), "--window", str(WINDOW)]
    command = ["import-lolcats", "--maps", "hazyresearch/lolcats-llama-3.1-70b", *asked]
    with hub_stand_in() as stand_in:
        use_hub(stand_in, monkeypatch)
        assert cli.main([*command, "--out", str(tmp_path / "none")]) == 1
        said = capsys.readouterr().err
        assert all(name in said for name in PUBLISHED)
        stand_in.files["hazyresearch/lolcats-llama-3.1-70b"] = {
            "model.pt": saved(tmp_path / "whole.pt", whole).read_bytes()
        }
        assert cli.main([*command, "--out", str(tmp_path / "hub")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "ignored: 2 buffers that the model computes itself, e.g. model.rotary_emb.inv_freq" in said
    plain = saved(tmp_path / "m.pt", maps_state()), saved(tmp_path / "l.pt", lora_state())
    checkpoints.import_checkpoint(*plain, str(tiny_model_dir), tmp_path / "files", checkpoints.Asked(window=WINDOW))
    assert (tmp_path / "hub" / "adapter.safetensors").read_bytes() == (
        tmp_path / "files" / "adapter.safetensors"
    ).read_bytes()


def test_maps_of_stage_two_win(tiny_model_dir: Path, tmp_path: Path) -> None:
    second = maps_state(prefix="base_model.model.model.", seed=5)
    both = imported(tmp_path / "both", tiny_model_dir, maps_state(seed=4), {**second, **lora_state()})
    alone = imported(tmp_path / "alone", tiny_model_dir, second, lora_state())
    assert (both / "adapter.safetensors").read_bytes() == (alone / "adapter.safetensors").read_bytes()


def test_tied_maps_without_key_maps(tiny_model_dir: Path, tmp_path: Path) -> None:
    maps = {name: t for name, t in maps_state().items() if "feature_map_k" not in name}
    adapter = imported(tmp_path, tiny_model_dir, maps)
    ids = token_ids(4 * WINDOW)
    twice = {**maps, **{n.replace("map_q", "map_k"): t for n, t in maps.items() if "feature_map" in n}}
    expected = Original(tiny_model_dir, twice).logits(ids)
    torch.testing.assert_close(our_logits(adapter, ids), expected, rtol=0, atol=1e-9)


def test_layers_that_kept_softmax(tiny_model_dir: Path, tmp_path: Path) -> None:
    maps = {name: t for name, t in maps_state().items() if "layers.1." not in name}
    with pytest.raises(UserError, match=r"of layer 1; .*--keep-softmax 1"):
        imported(tmp_path / "refused", tiny_model_dir, maps)
    adapter = imported(tmp_path / "taken", tiny_model_dir, maps, keep_softmax=(1,))
    model, _ = hub.load(adapter, device="cpu")
    assert student_config(model).keep_softmax == (1,)


# Round trips


@pytest.mark.parametrize("case", ["terrace", "sliding", "linear", "t2r", "affine", "half"])
def test_files_come_back_exactly(case: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    state, said, _ = CASES[case]
    maps, lora = maps_state(**state), lora_state(targets="qkvo")
    adapter = imported(tmp_path, tiny_model_dir, maps, lora, **said)
    checkpoints.export_checkpoint(adapter, tmp_path / "back")
    for name, wanted in (("maps.pt", maps), ("lora.pt", lora)):
        content = torch.load(tmp_path / "back" / name, weights_only=True)["model_state_dict"]
        assert content.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.equal(content[key], tensor), key


STUDENTS = [
    StudentConfig(window=4, feature_map=FeatureMapConfig(feature_dim=6)),
    StudentConfig(name="sliding", window=5, affine=True, feature_map=FeatureMapConfig(name="exp", feature_dim=3)),
    StudentConfig(name="linear", feature_map=FeatureMapConfig(name="elu", feature_dim=8, skip=True)),
    StudentConfig(window=4, tied=True, keep_softmax=(0,), feature_map=FeatureMapConfig(feature_dim=6)),
    StudentConfig(window=4, key_maps="per_kv_head", feature_map=FeatureMapConfig(feature_dim=6)),
]


@pytest.mark.parametrize("student", STUDENTS, ids=lambda s: f"{s.name}-{s.feature_map.name}-{s.key_maps}")
def test_our_adapters_come_back_exactly(student: StudentConfig, tiny_model_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    attach_students(model, student)
    lora = LoraConfig(rank=3, alpha=5.0, targets=("k_proj", "o_proj"))
    add_lora(model, lora)
    with torch.no_grad():
        for parameter in adapter_state(model).values():
            parameter.copy_(torch.randn_like(parameter))
    set_mode(model, "student")
    hub.save_adapter(model, tmp_path / "ours", base=ModelConfig(path=str(tiny_model_dir)), lora=lora)
    assert cli.main(["export", str(tmp_path / "ours"), "--to", "lolcats", "--out", str(tmp_path / "pt")]) == 0
    files = [str(tmp_path / "pt" / name) for name in ("maps.pt", "lora.pt")]
    command = ["import-lolcats", "--maps", files[0], "--lora", files[1], "--base", str(tiny_model_dir)]
    assert cli.main([*command, "--out", str(tmp_path / "again")]) == 0
    first, second = (json.loads((tmp_path / name / "trenchcoat.json").read_text()) for name in ("ours", "again"))
    assert second == first
    assert first["sha256"]


def test_what_the_original_does_not_have_is_not_exported(tiny_model_dir: Path, tmp_path: Path) -> None:
    small = FeatureMapConfig(feature_dim=6)
    refused = {
        "no attention like": StudentConfig(name="window_sinks", window=4, sinks=2),
        "no sinks": StudentConfig(window=4, sinks=2, feature_map=small),
        "bottleneck": StudentConfig(window=4, feature_map=FeatureMapConfig(feature_dim=6, adapter_dim=2)),
        "for each feature": StudentConfig(window=4, feature_map=FeatureMapConfig(name="t2r", feature_dim=6)),
    }
    for number, (reason, student) in enumerate(refused.items()):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        attach_students(model, student)
        with torch.no_grad():
            for parameter in adapter_state(model).values():
                parameter.copy_(torch.randn_like(parameter))
        folder = tmp_path / str(number)
        hub.save_adapter(model, folder, base=ModelConfig(path=str(tiny_model_dir)))
        with pytest.raises(UserError, match=reason):
            checkpoints.export_checkpoint(folder, tmp_path / "out")
    with pytest.raises(UserError, match="holds no adapter"):
        checkpoints.export_checkpoint(tiny_model_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Invalid files


class Touch:
    """Unpickled by an ordinary unpickler, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch", "pickle", "nested"])
def test_a_pickle_that_would_execute_code_does_not(form: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    mark, file = tmp_path / "executed", tmp_path / "bad.pt"
    state: dict[str, Any] = {**maps_state(), "model.layers.0.self_attn.window_factors": Touch(mark)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(Touch(mark)))
    else:
        torch.save({"model_state_dict": state} if form == "nested" else state, file)
    with pytest.raises(UserError, match=r"bad\.pt"):
        checkpoints.import_checkpoint(file, None, str(tiny_model_dir), tmp_path / "out", checkpoints.Asked())
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    if form == "pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert mark.exists(), "the file is harmless: the test shows nothing"


Q = "model.layers.0.self_attn.feature_map_q.mlp.layer"


def _changed(change: Callable[[State], Any]) -> State:
    state = maps_state()
    result = change(state)
    return result if isinstance(result, dict) else state


BAD: dict[str, tuple[Callable[[State], Any], str]] = {
    "a missing tensor": (lambda s: s.pop(Q) is None, r"1 tensors are missing, e\.g\. feature_map_q"),
    "another shape": (lambda s: s.update({Q: torch.ones(4, 6, 8)}), r"is \[4, 6, 8\]; .* \[4, 8, 8\]"),
    "other heads": (lambda s: s.update({Q: torch.ones(2, 8, 6)}), r"is \[2, 8, 6\]"),
    "a renamed key": (lambda s: s.update({Q.replace("map_q", "map_x"): s.pop(Q)}), "neither a feature map"),
    "a foreign key": (lambda s: s.update({"lm_head.weight": torch.ones(2)}), "lm_head.weight"),
    "a layer too many": (lambda s: s.update({Q.replace(".0.", ".9."): s[Q]}), r"layer 9, --base has the layers 0\.\.1"),
    "not finite": (lambda s: s[Q].fill_(float("nan")) is None, "not finite"),
    "integers": (lambda s: s.update({Q: torch.ones(4, 8, 6, dtype=torch.long)}), "tensor of numbers"),
    "no tensor": (lambda s: s.update({Q: [1.0]}), "should be a tensor of numbers, it is list"),
    "twice": (lambda s: s.update({f"base_model.{Q}": s[Q]}), "twice"),
    "an adapter": (lambda s: s.update({f"{Q}0": s[Q]}), "untied_head_adapter"),
    "nothing": (lambda s: {}, "should be a dictionary of tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_files_that_do_not_fit_are_refused(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    change, message = BAD[name]
    with pytest.raises(UserError, match=message):
        imported(tmp_path, tiny_model_dir, _changed(change))
    assert not (tmp_path / "adapter").exists()


def test_settings_that_do_not_fit_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    for number, (asked, message) in enumerate([
        ({"attention": "linear"}, "window_factors, so its attention cannot be 'linear'; expected terrace or sliding"),
        ({"attention": "teracce"}, "did you mean terrace"),
        ({"feature_map": "hedgog"}, "did you mean hedgehog"),
        ({"window": 0}, "student.window must be at least 1"),
        ({"keep_softmax": (0, 1)}, "names all 2 layers"),
        ({"skip": True}, "skip needs feature_dim equal"),
        ({"lora_alpha": -1.0}, "lora.alpha"),
    ]):  # fmt: skip
        with pytest.raises(UserError, match=message):
            imported(tmp_path / str(number), tiny_model_dir, maps_state(), lora_state(), **asked)
    for number, (lora, message) in enumerate([
        (maps_state(), "holds no LoRA"),
        ({n: t for n, t in lora_state().items() if "1.self_attn.v_proj.lora_B" not in n}, "1 tensors are missing"),
        ({n.replace("v_proj", "z_proj"): t for n, t in lora_state().items()}, "does not have"),
        ({n: t[:, :1] if "lora_B" in n else t for n, t in lora_state().items()}, r"is \[32, 1\]"),
    ]):  # fmt: skip
        with pytest.raises(UserError, match=message):
            imported(tmp_path / f"lora{number}", tiny_model_dir, maps_state(), lora)


def test_another_base_is_refused(tiny_model_dir: Path, other_model_dir: Path, tmp_path: Path) -> None:
    """The adapter remembers the base it was imported over, though its weights were never loaded."""
    adapter = imported(tmp_path, tiny_model_dir, maps_state())
    hub.load(adapter, device="cpu")
    with pytest.raises(UserError, match="made for another base model"):
        hub.load(adapter, device="cpu", base=str(other_model_dir))


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04broken", pickle.dumps([1, 2]), b"\x80\x02."])
def test_other_files_are_refused_in_one_line(
    content: bytes, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.pt"
    file.write_bytes(content)
    arguments = ["--maps", str(file), "--base", str(tiny_model_dir), "--out", str(tmp_path / "out")]
    assert cli.main(["import-lolcats", *arguments]) == 1
    assert "Traceback" not in (said := capsys.readouterr().err)
    assert said.startswith(f"trenchcoat: {file}")
    assert len(said.splitlines()) == 1


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return saved(tmp_path_factory.mktemp("sound") / "m.pt", maps_state()).read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_a_clear_error_or_harmless(
    data: st.DataObject, sound: bytes, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Cut short, or with a few bytes changed: a UserError, or numbers that still make a complete adapter."""
    broken = bytearray(sound)
    if data.draw(st.booleans()):
        broken = broken[: data.draw(st.integers(0, len(sound) - 1))]
    else:
        for place in data.draw(st.lists(st.integers(0, len(sound) - 1), min_size=1, max_size=8)):
            broken[place] = data.draw(st.integers(0, 255))
    file = tmp_path / "m.pt"
    file.write_bytes(bytes(broken))
    out = tmp_path / "out"
    try:
        checkpoints.import_checkpoint(file, None, str(tiny_model_dir), out, checkpoints.Asked(window=WINDOW))
    except UserError:
        assert not out.exists()
    else:
        hub.load(out, device="cpu")
        shutil.rmtree(out)
