"""Feature maps: every name, option and initialisation against autograd of the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trenchcoat.config import KNOWN_FEATURE_MAPS, FeatureMapConfig
from trenchcoat.students import ACTIVATIONS, FeatureMap, feature_maps

HEADS, DIM, TOKENS = 4, 6, 7


def _formula(phi: FeatureMap, x: Tensor) -> Tensor:
    """phi(x) = act(x W + b) according to the settings."""
    cfg = phi.cfg
    x = x.repeat_interleave(phi.num_heads // x.shape[1], 1)
    if phi.down is not None and phi.up is not None:
        x = x + torch.relu(x @ phi.down) @ phi.up
    u = x @ phi.weight
    if phi.bias is not None:
        u = u + phi.bias[:, None]
    if cfg.skip:
        u = u + x

    def exp(t: Tensor) -> Tensor:
        return torch.exp(t - t.amax(-1, keepdim=True))

    f = {
        "hedgehog": lambda: torch.cat([u.softmax(-1), (-u).softmax(-1)], -1),
        "hedgehog_half": lambda: u.softmax(-1),
        "t2r": lambda: torch.relu(u),
        "exp": lambda: torch.cat([exp(u), exp(-u)], -1),
        "exp_half": lambda: exp(u),
        "elu": lambda: 1 + torch.nn.functional.elu(u),
    }[cfg.name]()
    return f.clamp_min(cfg.eps)


def _map(name: str, **options: object) -> FeatureMap:
    phi = FeatureMap(FeatureMapConfig(name=name, **options), num_heads=HEADS, head_dim=DIM)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in phi.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return phi


OPTIONS = [
    {"feature_dim": 5},
    {"feature_dim": 9, "bias": True},
    {"feature_dim": 6, "skip": True, "init": "normal"},
    {"feature_dim": 5, "adapter_dim": 3, "bias": False},
    {"feature_dim": 6, "adapter_dim": 3, "skip": True, "bias": True, "init": "kaiming"},
]


@pytest.mark.parametrize("inputs", [4, 2, 1])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_formula_and_gradients(
    name: str, options: dict[str, object], inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    phi = _map(name, **options).double()
    x = torch.randn(2, inputs, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    want = _formula(phi, x)
    projection = torch.randn_like(want)
    leaves = [x, *phi.parameters()]
    exact = torch.autograd.grad((want * projection).sum(), leaves)
    for rows in (feature_maps.BLOCK_ROWS, 8):
        monkeypatch.setattr(feature_maps, "BLOCK_ROWS", rows)
        found = phi(x)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-14)
        for a, b in zip(torch.autograd.grad((found * projection).sum(), leaves), exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_features_are_float32_positive_and_clamped(name: str) -> None:
    phi = _map(name, feature_dim=5)
    f = phi.requires_grad_(False)((30 * torch.randn(2, HEADS, TOKENS, DIM)).bfloat16())
    assert f.dtype == torch.float32
    assert f.shape == (2, HEADS, TOKENS, phi.features)
    assert f.min().item() >= phi.cfg.eps * (1 - 1e-6)


def test_identity_is_a_rectangular_eye_and_zero_with_skip() -> None:
    for width in (4, 6, 9):
        phi = FeatureMap(FeatureMapConfig(feature_dim=width), num_heads=2, head_dim=6)
        assert torch.equal(phi.weight[1], torch.eye(6, width))
    assert not FeatureMap(FeatureMapConfig(feature_dim=6, skip=True), num_heads=2, head_dim=6).weight.any()
    phi = FeatureMap(FeatureMapConfig(feature_dim=6, adapter_dim=2), num_heads=2, head_dim=6)
    x = torch.randn(1, 2, 3, 6)
    plain = FeatureMap(FeatureMapConfig(feature_dim=6), num_heads=2, head_dim=6)
    assert torch.equal(phi(x), plain(x))


@pytest.mark.parametrize("init", ["identity", "kaiming", "normal"])
def test_parameters_can_be_created_on_meta_and_initialised_later(init: str) -> None:
    cfg = FeatureMapConfig(name="t2r", init=init, feature_dim=6, adapter_dim=2, skip=True)  # type: ignore[arg-type]
    with torch.device("meta"):
        phi = FeatureMap(cfg, num_heads=2, head_dim=6)
    phi.to_empty(device="cpu")
    torch.manual_seed(5)
    phi.reset_parameters()
    torch.manual_seed(5)
    fresh = FeatureMap(cfg, num_heads=2, head_dim=6)
    torch.manual_seed(5)
    fresh.reset_parameters()
    for a, b in zip(phi.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_t2r_learns_a_bias_by_default() -> None:
    assert [name for name in ACTIVATIONS if _map(name, feature_dim=6).bias is not None] == ["t2r"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "hedgehogs"}, "feature map is 'hedgehogs'"),
        ({"feature_dim": 0}, "feature_dim is 0"),
        ({"feature_dim": 5, "skip": True}, "skip needs feature_dim"),
        ({"init": "xavier"}, "init is 'xavier'"),
        ({"adapter_dim": 0}, "adapter_dim is 0"),
    ],
)
def test_invalid_settings_are_rejected(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureMap(FeatureMapConfig(**options), num_heads=2, head_dim=6)  # type: ignore[arg-type]


def test_names_of_the_settings_are_the_names_of_the_activations() -> None:
    assert set(KNOWN_FEATURE_MAPS) == set(ACTIVATIONS)


def test_landmarks_are_centred_keys_of_the_right_group() -> None:
    feature_map = FeatureMap(FeatureMapConfig(feature_dim=6, init="landmarks"), num_heads=4, head_dim=8)
    keys_GND = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
    feature_map.set_landmarks(keys_GND, 0.5)
    for head in range(4):
        own = keys_GND[head // 2]
        landmarks = feature_map.weight[head].detach().T / 0.5 + own.mean(0)
        distance = (landmarks[:, None] - own[None]).abs().amax(-1).amin(-1)
        assert distance.max() < 1e-5, f"head {head}: its landmarks are not among the keys of its group"
    with pytest.raises(ValueError, match="at least feature_dim = 6 keys; the first rows have 5"):
        feature_map.set_landmarks(keys_GND[:, :5], 0.5)
