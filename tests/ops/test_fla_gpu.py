"""flash-linear-attention's kernels on a GPU: against the definitions in float64, and students on them against PyTorch.

Skipped without a CUDA device or the extra `fla`: nothing of them runs elsewhere.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from trenchcoat.config import FeatureMapConfig, StudentConfig
from trenchcoat.ops import fla_kernels, recurrences
from trenchcoat.students import build_student

WHY = "no CUDA device" if not torch.cuda.is_available() else "" if find_spec("fla") else "fla-core is not installed"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(WHY), reason=WHY),
    pytest.mark.filterwarnings("default"),  # fla warns about versions of triton and of Python
]

LEARNS = pytest.mark.skipif(
    not WHY and bool(fla_kernels.obstacle(torch.bfloat16, torch.device("cuda"))), reason="triton before 3.7.1 on Hopper"
)
SHARE = 2**-5.4
"""Error over size, of whole tensors. Operands of products and what is stored are rounded to bfloat16, by 2^-8 at most
and 2^-9.2 as a root mean square; the delta rules chain about ten such products forward and as many again backward,
whose errors add as their squares do: sqrt(20) 2^-9.2 = 2^-7. Three times that."""


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def _inputs(tokens: int, dim: int) -> dict[str, Tensor]:
    """q, k and v with values of bfloat16, gates, an initial memory, all in float64."""
    make = torch.Generator().manual_seed(tokens + dim)

    def random(*shape: int) -> Tensor:
        return torch.randn(2, 3, *shape, generator=make, dtype=torch.float64)

    found = {
        "q": normalize(random(tokens, dim), dim=-1).bfloat16(),
        "k": normalize(random(tokens, dim), dim=-1).bfloat16(),
        "v": random(tokens, dim).bfloat16(),
        "forget": logsigmoid(random(tokens) + 4.0).float(),
        "channels": logsigmoid(random(tokens, dim) + 4.0).float(),
        "beta": random(tokens).sigmoid().float(),
        "start": random(dim, dim).float(),
    }
    return {name: x.double().cuda() for name, x in found.items()}


RULES: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "gated_delta": (fla_kernels.gated_delta, recurrences.gated_delta, ("forget", "beta")),
    "kimi_delta": (fla_kernels.kimi_delta, recurrences.kimi_delta, ("channels", "beta")),
    "gated_sums": (fla_kernels.gated_sums, recurrences.gated_sums, ("forget",)),
}


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tokens", [1, 16, 63, 64, 257])
@pytest.mark.parametrize("rule", RULES)
def test_outputs_and_memory(rule: str, tokens: int, dim: int) -> None:
    """Without gradients, where few tokens go through a kernel of their own."""
    run, definition, gates = RULES[rule]
    given = _inputs(tokens, dim)
    *tensors, start = (given[name] for name in ("q", "k", "v", *gates, "start"))
    with torch.no_grad():
        wanted = definition(*tensors, torch.ones(2, tokens, dtype=torch.bool, device="cuda"), start)
        found = run(*(x.bfloat16() for x in tensors[:3]), *tensors[3:], start.float())
    errors = [_error(x, y) for x, y in zip(found, wanted, strict=True)]
    assert max(errors) <= SHARE


@LEARNS
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tokens", [1, 64, 257])
@pytest.mark.parametrize("rule", RULES)
def test_gradients(rule: str, tokens: int, dim: int) -> None:
    run, definition, gates = RULES[rule]
    given = {name: x.requires_grad_() for name, x in _inputs(tokens, dim).items()}
    names = ("q", "k", "v", *gates, "start")
    *tensors, start = used = [given[name] for name in names]
    wanted = definition(*tensors, torch.ones(2, tokens, dtype=torch.bool, device="cuda"), start)
    found = run(*(x.bfloat16() for x in tensors[:3]), *tensors[3:], start.float())
    weights = [torch.randn_like(x) for x in wanted]
    losses = [sum((x * w).sum() for x, w in zip(each, weights, strict=True)) for each in (found, wanted)]
    grads = [torch.autograd.grad(loss, used) for loss in losses]
    errors = {name: _error(x, y) for name, x, y in zip(names, *grads, strict=True)}
    assert {name: error for name, error in errors.items() if not error <= SHARE} == {}


@LEARNS
@pytest.mark.parametrize("name", ["gdn", "kda", "lightning", "gated_delta_layer"])
def test_a_student_on_them(name: str) -> None:
    """Prompt, gradients and single tokens, in bfloat16 against the same student on PyTorch in float32."""
    heads, kv, dim, width, tokens = 4, 2, 64, 96, 200
    students = []
    for impl in ("fla", "chunkwise"):
        torch.manual_seed(0)
        phi = FeatureMapConfig(feature_dim=32)
        cfg = StudentConfig(name=name, window=0 if name == "gated_delta_layer" else 64, feature_map=phi, impl=impl)
        student = build_student(cfg, num_heads=heads, num_kv_heads=kv, head_dim=dim, hidden_size=width).cuda()
        with torch.no_grad():
            for p in student.parameters():
                p.add_(0.02 * torch.randn_like(p))
        students.append(student)
    shapes = {"q_BHTD": (1, heads, tokens, dim), "k_BGTD": (1, kv, tokens, dim), "v_BGTE": (1, kv, tokens, dim)}
    given = {x: torch.randn(shape).bfloat16().cuda() for x, shape in {**shapes, "x_BTM": (1, tokens, width)}.items()}
    found = []
    for student, dtype in zip(students, (torch.bfloat16, torch.float32), strict=True):
        x = {each: t.to(dtype) for each, t in given.items()}
        y, _ = student(**x, scale=dim**-0.5)
        y.float().square().mean().backward()
        learned = {each: p.grad for each, p in student.named_parameters() if p.grad is not None}
        with torch.no_grad():
            first = {each: t[:, :-1] if each == "x_BTM" else t[:, :, :-1] for each, t in x.items()}
            last = {each: t[:, -1:] if each == "x_BTM" else t[:, :, -1:] for each, t in x.items()}
            empty = student.empty_state(1, dtype=dtype, device="cuda")
            _, state = student(**first, scale=dim**-0.5, state=empty)
            token = student.decode(**last, scale=dim**-0.5, state=state)
        found.append({"y": y, "token": token, **learned})
    assert found[0].keys() == found[1].keys()
    errors = {each: _error(found[0][each], found[1][each]) for each in found[0] if found[1][each].norm() > 0}
    assert {each: error for each, error in errors.items() if not error <= 2 * SHARE} == {}
    assert _error(found[0]["token"], found[0]["y"][:, :, -1:]) <= 2 * SHARE
