"""`export --native`: a model of Transformers' own class computes what the linearized model computes, without this
package; what the class cannot hold is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import byte_tokenizer
from tiny_families import GREEDY, LLAMA3_ROPE, logits, tiny_model, tokens
from trenchcoat.cli import app as cli
from trenchcoat.config import LoraConfig, StudentConfig, UserError
from trenchcoat.models import hub
from trenchcoat.models.attach import attach_students, set_mode
from trenchcoat.models.lora import add_lora, lora_parameters
from trenchcoat.models.native import native_model, save_native

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3_ROPE}, (1,)),
    "llama, tied, heads of 64": ("llama", {"head_dim": 64, "tie_word_embeddings": True}, (0,)),
    "llama, heads of 128": ("llama", {"head_dim": 128, "num_attention_heads": 2}, (0,)),
    "llama, biases of q, k and v": ("llama", {"attention_bias": True}, (1,)),
    "llama, yarn": ("llama", {"rope_parameters": YARN}, (1,)),
    "mistral": ("mistral", {"sliding_window": None}, (0, 2)),
    "qwen2": ("qwen2", {}, (1,)),
    "qwen3": ("qwen3", {}, (0,)),
    "qwen3, biases": ("qwen3", {"attention_bias": True}, (1, 2)),
}


def linearized(family: str, settings: dict[str, Any], kept: tuple[int, ...]) -> Any:
    """A model of three layers in mode `student`; norms, biases and students far from their initial values."""
    model = tiny_model(family, num_hidden_layers=3, **settings)
    attach_students(model, StudentConfig(name="gated_delta_layer", keep_softmax=kept))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if ".student." in name:
                parameter.add_(0.1 * noise)
            elif "norm" in name:
                parameter.copy_(0.05 + 1.5 * noise.sigmoid())
            elif name.endswith(".bias") and "o_proj" not in name:
                parameter.copy_(noise)
    set_mode(model, "student")
    return model


def tolerance(model: Any, wanted: Tensor) -> float:
    """Weights are multiplied by norms before, not after, the input: each product is rounded otherwise (2^-24 relative,
    with independent signs), in M terms of a sum, a few such sums a layer, relative to the largest logit."""
    return 8.0 * 2.0**-24 * model.config.hidden_size**0.5 * model.config.num_hidden_layers * float(wanted.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_logits_and_generation_are_equal(case: str, tmp_path: Path) -> None:
    model, ids = linearized(*CASES[case]), tokens(2, 37)
    save_native(model, tmp_path / "native", byte_tokenizer())
    assert not list((tmp_path / "native").glob("*.py"))
    native, info = AutoModelForCausalLM.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert type(native).__module__.startswith("transformers.")
    assert not any(info.values()), info
    wanted = logits(model, ids)
    close = {"rtol": 0.0, "atol": tolerance(model, wanted)}
    torch.testing.assert_close(logits(native.eval(), ids), wanted, **close)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    padded = (logits(one, ids, attention_mask=mask)[mask.bool()] for one in (native, model))
    torch.testing.assert_close(*padded, **close)
    given = {"attention_mask": mask[:, :12], "max_new_tokens": 12, **GREEDY}
    assert torch.equal(native.generate(ids[:, :12], **given), model.generate(ids[:, :12], **given))


def test_a_kept_layer_is_needed_to_make_a_difference() -> None:
    """The test above would see a kept layer that is not the teacher's: its weights matter."""
    model, ids = linearized(*CASES["llama"]), tokens(1, 37)
    native, wanted = native_model(model), logits(model, ids)
    attention = native.model.layers[1].self_attn
    with torch.no_grad():
        attention.q_proj.bias.mul_(0.5)  # the constants are then half as large, the scores four times
    assert (logits(native, ids) - wanted).abs().max() > 100 * tolerance(model, wanted)


_STRANGER = """
import sys
sys.modules["trenchcoat"] = None
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder).eval()
AutoTokenizer.from_pretrained(folder)
try:
    import trenchcoat
except ImportError:
    pass
else:
    raise SystemExit("trenchcoat could be imported")
with torch.no_grad():
    found = model(torch.tensor([ids])).logits[0, -1].tolist()
print(json.dumps([found, model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8)[0].tolist()]))
"""


def test_a_process_that_cannot_import_this_package_opens_it(tmp_path: Path) -> None:
    model, ids = linearized(*CASES["llama"]), tokens(1, 20)
    hub.save_merged(model, tmp_path / "merged", byte_tokenizer())
    assert cli.main(["export", str(tmp_path / "merged"), "--native", "--out", str(tmp_path / "native")]) == 0
    ran = subprocess.run(
        [sys.executable, "-c", _STRANGER, str(tmp_path / "native"), json.dumps(ids[0].tolist())],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found, written = json.loads(ran.stdout.splitlines()[-1])
    wanted = logits(model, ids)
    close = {"rtol": 0.0, "atol": tolerance(model, wanted)}
    torch.testing.assert_close(torch.tensor(found), wanted[0, -1], **close)
    assert written == model.generate(ids, do_sample=False, max_new_tokens=8)[0].tolist()
    card = (tmp_path / "native" / "README.md").read_text()
    assert "Qwen3_5ForCausalLM" in card
    assert "trust_remote_code" not in card


def test_lora_is_merged_and_weights_are_those_of_the_dtype() -> None:
    model, ids = linearized(*CASES["qwen3"]), tokens(1, 20)
    add_lora(model, LoraConfig(targets=("q_proj", "up_proj")))
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.normal_(0.0, 0.1)
    wanted = logits(model, ids)
    torch.testing.assert_close(logits(native_model(model), ids), wanted, rtol=0.0, atol=tolerance(model, wanted))
    with pytest.raises(UserError, match="too large for float16"):
        native_model(linearized(*CASES["llama"]).to(torch.float16))
    half = native_model(model.to(torch.bfloat16))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    # about 20 tensors a layer are rounded, each by at most 2^-9 of itself, with independent signs; norms and softmax
    # pass that on, at most some times larger
    off = (logits(half, ids).float() - wanted).square().mean().sqrt()
    assert off < 4 * 2.0**-9 * (20 * 3) ** 0.5 * wanted.square().mean().sqrt()


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "another student": ("llama", {}, {"name": "gdn", "window": 4}, "student.name=gdn"),
    "another family": ("granite", {}, {}, "granite.*llama, mistral, qwen2, qwen3"),
    "no kept layer": ("llama", {}, {"keep_softmax": ()}, r"no layer keeps softmax.*keep_softmax=\[0\]"),
    "a scale by position": ("llama", {}, {"kept_log_scale": 600.0}, "kept_log_scale=600: Qwen3.5 has no scale"),
    "a sliding window": ("mistral", {"sliding_window": 9}, {}, "layer 1 is kept.*sliding_window=9"),
    "another activation": ("llama", {"hidden_act": "gelu"}, {}, "hidden_act.*'gelu'"),
    "wide heads without norms": ("llama", {"head_dim": 256, "num_attention_heads": 2}, {}, "heads of 256"),
    "RoPE of another type": (
        "llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, {}, "'dynamic'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_class_cannot_hold_is_refused(case: str) -> None:
    family, settings, student, reason = REFUSED[case]
    model = tiny_model(family, **settings)
    attach_students(model, StudentConfig(**{"name": "gated_delta_layer", "keep_softmax": (1,), **student}))
    with pytest.raises(UserError, match=reason):
        native_model(model)


def test_biases_that_the_class_lacks_are_refused_by_the_name_of_the_tensor() -> None:
    for settings, part in (
        ({"mlp_bias": True}, "mlp.up_proj.bias"),
        ({"attention_bias": True}, "self_attn.o_proj.bias"),
    ):
        model = tiny_model("llama", **settings)
        attach_students(model, StudentConfig(name="gated_delta_layer", keep_softmax=(1,)))
        with torch.no_grad():
            model.get_parameter(f"model.layers.1.{part}").fill_(1.0)
        with pytest.raises(UserError, match=f"layers.1.{part} is not 0"):
            native_model(model)
