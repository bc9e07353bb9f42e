"""The training loop: stepping, schedules, clipping, best weights, early stopping, saving and failures."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from training_kit import (
    RandomBatches,
    damage,
    fit_lora,
    fit_transfer,
    lora_settings,
    numbers_of,
    start_lora,
    tiny_llama,
    transfer_model,
    transfer_settings,
)
from trenchcoat.config import StageConfig, TransferConfig, UserError
from trenchcoat.data.batches import Batch
from trenchcoat.models.attach import students_of
from trenchcoat.models.hub import adapter_state
from trenchcoat.runtime.files import SaveError
from trenchcoat.runtime.runlog import RunLog, read_metrics
from trenchcoat.training import checkpoints
from trenchcoat.training.gradients import ParamGroups, average_and_clip, clip_groups, rate_factors
from trenchcoat.training.loop import FitResult, NonFiniteLoss, fit
from trenchcoat.training.objectives import Metrics, transfer_objective
from trenchcoat.training.schedules import build_schedule


class Point(nn.Module):
    """One parameter; its loss is half the squared distance from ``target``."""

    def __init__(self, start: float = 0.0, target: float = 1.0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([start]))
        self.target = target


def distance(model: nn.Module, batch: Batch) -> Metrics:
    """Objective of ``Point``; ignores the batch."""
    loss = 0.5 * (model.x - model.target).square().sum()
    if torch.is_grad_enabled():
        loss.backward()
    return {"loss": loss.item(), "tokens": 2.0}


class Scripted:
    """An objective with prescribed evaluation losses that moves x by one learning rate per step."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = iter(losses)

    def __call__(self, model: nn.Module, batch: Batch) -> Metrics:
        if torch.is_grad_enabled():
            model.x.sum().mul(-1).backward()
            return {"loss": 0.0, "tokens": 1.0}
        return {"loss": next(self.losses), "tokens": 1.0}


class OneBatch(RandomBatches):
    """One validation batch."""

    def validation_batches(self) -> int:
        """Only the first."""
        return 1


def settings(**changes: Any) -> StageConfig:
    base: dict[str, Any] = {
        "lr": 0.1, "max_steps": 6, "accumulation": 1, "clip": None, "schedule": "constant", "eval_every": 2,
        "save_every": 100,
    }  # fmt: skip
    return StageConfig(**{**base, **changes})


def run_fit(
    run_dir: Path, model: nn.Module, objective: Any, cfg: StageConfig, batches: RandomBatches | None = None
) -> FitResult:
    with RunLog(run_dir, progress="off") as run:
        return fit(model, batches or OneBatch(), objective, cfg, run, stage="stage")


def evals(run_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run_dir) if line["kind"] == "eval"]


# Schedules


def test_plateau_matches_torch() -> None:
    cfg = settings(schedule="plateau", plateau_factor=0.3, plateau_patience=2, min_lr=1e-3)
    ours = build_schedule(cfg, 100)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=cfg.lr)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=2, min_lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        loss = 1.0 + torch.rand(1, generator=generator).item()
        ours.observe(loss)
        theirs.step(loss)
        assert ours.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert ours.lr(99) == pytest.approx(1e-3)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "plateau"])
def test_warmup_and_minimum(name: str) -> None:
    schedule = build_schedule(settings(schedule=name, warmup_steps=4, min_lr=0.01), 24)
    assert [schedule.lr(step) for step in range(4)] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    end = 0.01 if name in ("cosine", "linear") else 0.1
    assert schedule.lr(24) == pytest.approx(end)
    rates = [schedule.lr(step) for step in range(4, 25)]
    assert rates == sorted(rates, reverse=True)
    if name != "constant" and end < 0.1:
        assert schedule.lr(14) == pytest.approx(0.055)


def test_a_minimum_above_the_rate_does_not_raise_it_and_unknown_names_are_refused() -> None:
    schedule = build_schedule(settings(schedule="cosine", lr=1e-6, min_lr=1e-5), 10)
    assert schedule.lr(9) == pytest.approx(1e-6)
    with pytest.raises(UserError, match="step_down"):
        build_schedule(dataclasses.replace(settings(), schedule="step_down"), 10)  # type: ignore[arg-type]


# Stepping


def test_steps_match_adamw_and_gradients_are_averaged(tmp_path: Path) -> None:
    model, twin = Point(), Point()
    cfg = settings(accumulation=3, max_steps=5, weight_decay=0.1, beta1=0.8, beta2=0.95)
    result = run_fit(tmp_path, model, distance, cfg)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1, betas=(0.8, 0.95), weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        distance(twin, {})
        optimizer.step()
    torch.testing.assert_close(model.x, twin.x)
    assert result.steps == 5
    assert result.tokens == 5 * 3 * 2
    lines = [line for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[0]["grad_norm"] == pytest.approx(1.0)
    assert lines[0]["lr"] == 0.1


def test_epochs_count_micro_batches_and_the_last_step_may_be_short(tmp_path: Path) -> None:
    batches = OneBatch(epoch=5)
    result = run_fit(tmp_path, Point(), distance, settings(max_steps=None, epochs=1.5, accumulation=3), batches)
    assert result.steps == 3
    assert batches.served == list(range(8))


def test_evaluation_at_the_start_every_few_steps_and_at_the_end(tmp_path: Path) -> None:
    result = run_fit(tmp_path, Point(), distance, settings(max_steps=5))
    assert [step for step, _ in evals(tmp_path)] == [0, 2, 4, 5]
    assert result.initial_loss == evals(tmp_path)[0][1] == 0.5
    assert result.final_loss == result.best_loss == evals(tmp_path)[-1][1]


def test_clipping_by_layer_and_by_all() -> None:
    model = transfer_model()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for scope, expected in (("layer", {"layer 0", "layer 1"}), ("global", {"the model"})):
        groups = clip_groups(model, trainable, scope)
        assert {group.name for group in groups} == expected
        assert sum(len(group.parameters) for group in groups) == len(trainable)
    groups = clip_groups(model, trainable, "layer")
    assert [group.loss for group in groups] == ["loss/layer_00", "loss/layer_01"]
    for group in groups:
        for parameter in group.parameters.values():
            parameter.grad = torch.full_like(parameter, 4.0 if group.name == "layer 0" else 2e-4)

    def norms() -> list[float]:
        found = [[p.grad for p in group.parameters.values()] for group in groups]
        return [torch.nn.utils.get_total_norm(gradients).item() for gradients in found]

    before = norms()
    norm = average_and_clip(groups, 2, 1.0)
    after = norms()
    assert norm == pytest.approx(math.hypot(*before) / 2, rel=1e-5)
    assert after[0] == pytest.approx(1.0, rel=1e-4)
    assert after[1] == pytest.approx(before[1] / 2, rel=1e-5)


# Best weights, early stopping


def test_the_best_weights_are_restored(tmp_path: Path) -> None:
    losses = [5.0, 3.0, 4.0, 6.0]
    model = Point()
    result = run_fit(tmp_path, model, Scripted(losses), settings())
    assert (result.best_loss, result.best_step, result.final_loss) == (3.0, 2, 6.0)
    assert model.x.item() == pytest.approx(0.2, rel=1e-4)
    last = Point()
    run_fit(tmp_path / "last", last, Scripted(losses), settings(restore_best=False))
    assert last.x.item() == pytest.approx(0.6, rel=1e-4)


def test_training_that_never_improves_ends_at_the_initial_weights(tmp_path: Path) -> None:
    model = Point()
    result = run_fit(tmp_path, model, Scripted([1.0, 2.0, 3.0, 4.0]), settings())
    assert (result.best_step, model.x.item()) == (0, 0.0)


def test_early_stopping_counts_evaluations_without_a_new_best(tmp_path: Path) -> None:
    cfg = settings(max_steps=100, early_stopping=2)
    result = run_fit(tmp_path, Point(), Scripted([5.0, 3.0, 4.0, 2.0, 2.5, 2.6]), cfg)
    assert (result.steps, result.early, result.best_step) == (10, True, 6)
    again = run_fit(tmp_path, Point(), Scripted([]), cfg)
    assert (again.steps, again.early, again.resumed_from) == (10, True, 10)


# Saving and resuming


def kept(run_dir: Path, stage: str = "stage") -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints" / stage).iterdir())


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    cfg = settings(max_steps=8, save_every=2, keep_checkpoints=2)
    run_fit(tmp_path, Point(), Scripted([5.0, 1.0, 4.0, 3.0, 2.0]), cfg)
    assert kept(tmp_path) == ["step-00000006", "step-00000008"]


def test_a_finished_stage_is_loaded_not_trained(tmp_path: Path) -> None:
    losses = [5.0, 3.0, 4.0, 6.0]
    first = run_fit(tmp_path, Point(), Scripted(losses), settings())
    before = numbers_of(tmp_path)
    model = Point()
    again = run_fit(tmp_path, model, Scripted([]), settings())
    assert dataclasses.replace(again, resumed_from=None, seconds=first.seconds) == first
    assert model.x.item() == pytest.approx(0.2, rel=1e-4)
    assert numbers_of(tmp_path) == before
    assert sum(line["kind"] == "result" for line in read_metrics(tmp_path)) == 1


def test_more_steps_continue_a_finished_stage(tmp_path: Path) -> None:
    run_fit(tmp_path, Point(), distance, settings(max_steps=4))
    longer, straight = Point(), Point()
    assert run_fit(tmp_path, longer, distance, settings(max_steps=8)).resumed_from == 4
    run_fit(tmp_path / "straight", straight, distance, settings(max_steps=8))
    torch.testing.assert_close(longer.x, straight.x, rtol=0, atol=0)
    with pytest.raises(UserError, match="already past the requested 6 steps"):
        run_fit(tmp_path, Point(), distance, settings(max_steps=6))


def test_a_reduced_rate_survives_a_restart(tmp_path: Path) -> None:
    cfg = settings(schedule="plateau", plateau_patience=0, plateau_factor=0.5, max_steps=4)
    losses = [1.0, 2.0, 3.0, 4.0, 5.0]
    for folder, lengths in (("straight", [8]), ("resumed", [4, 8])):
        scripted = Scripted(losses)
        for steps in lengths:
            run_fit(tmp_path / folder, Point(), scripted, dataclasses.replace(cfg, max_steps=steps))
    rates = [line["lr"] for line in read_metrics(tmp_path / "resumed") if line["kind"] == "train"]
    assert rates == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125]
    assert numbers_of(tmp_path / "resumed") == numbers_of(tmp_path / "straight")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"lr": 0.2}, "lr was 0.1, is 0.2 now"), ({"accumulation": 4}, "accumulation was 1, is 4 now")],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run_fit(tmp_path, Point(), distance, settings())
    with pytest.raises(UserError, match=message):
        run_fit(tmp_path, Point(), distance, settings(**changes))


def test_a_checkpoint_of_another_model_or_data_is_refused(tmp_path: Path) -> None:
    cfg = transfer_settings(max_steps=2)
    fit_transfer(transfer_model(), tmp_path, cfg, RandomBatches())
    with pytest.raises(UserError, match="base model"):
        fit_transfer(transfer_model(seed=7), tmp_path, cfg, RandomBatches())
    with pytest.raises(UserError, match="trained parameters"):
        fit_transfer(transfer_model(layers=3), tmp_path, cfg, RandomBatches())
    other = RandomBatches()
    other.fingerprint = "other tokens"
    with pytest.raises(UserError, match="data was 'random tokens', is 'other tokens' now"):
        fit_transfer(transfer_model(), tmp_path, cfg, other)


def test_stage_two_refuses_a_checkpoint_over_other_students(tmp_path: Path) -> None:
    model, cfg = transfer_model(), lora_settings(max_steps=2, train_feature_maps=False)
    start_lora(model, cfg)
    fit_lora(model, tmp_path, cfg, RandomBatches())
    other = transfer_model()
    with torch.no_grad():
        students_of(other)[1].mix_H.add_(0.1)
    start_lora(other, cfg)
    with pytest.raises(UserError, match="frozen students"):
        fit_lora(other, tmp_path, cfg, RandomBatches())


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_gives_the_same_result(tmp_path: Path) -> None:
    cfg = transfer_settings()
    whole, continued = transfer_model(), transfer_model()
    fit_transfer(whole, tmp_path / "whole", cfg, RandomBatches())
    fit_transfer(transfer_model(), tmp_path / "continued", dataclasses.replace(cfg, max_steps=8), RandomBatches())
    damage(tmp_path / "continued" / "checkpoints" / "transfer" / "step-00000008" / "tensors.safetensors")
    result = fit_transfer(continued, tmp_path / "continued", cfg, RandomBatches())
    assert result.resumed_from == 4
    warnings = [line["text"] for line in read_metrics(tmp_path / "continued") if line["kind"] == "warning"]
    assert any("step-00000008/tensors.safetensors is damaged" in text for text in warnings)
    assert numbers_of(tmp_path / "continued") == numbers_of(tmp_path / "whole")
    for name, tensor in adapter_state(whole).items():
        assert torch.equal(tensor, adapter_state(continued)[name]), name


def test_the_best_weights_are_in_every_checkpoint(tmp_path: Path) -> None:
    """A run stopped after the best evaluation with a single checkpoint kept still ends with the best weights."""
    cfg = settings(max_steps=8, save_every=2, keep_checkpoints=1)
    run_fit(tmp_path, Point(), Scripted([5.0, 1.0, 4.0, 3.0]), dataclasses.replace(cfg, max_steps=6))
    assert kept(tmp_path) == ["step-00000006"]
    model = Point()
    result = run_fit(tmp_path, model, Scripted([2.0]), cfg)
    assert (result.resumed_from, result.best_step, result.best_loss) == (6, 2, 1.0)
    assert model.x.item() == pytest.approx(0.2, rel=1e-4)


def test_a_stage_run_in_parts_equals_one_run(tmp_path: Path) -> None:
    """``until`` ends a call midway; the next call continues with the same evaluations."""
    cfg = transfer_settings(schedule="plateau", plateau_patience=0, lr=0.3)
    whole, pieces = transfer_model(), transfer_model()
    fit_transfer(whole, tmp_path / "whole", cfg, RandomBatches())
    for until in (1, 4, 9):
        result = fit_transfer(pieces, tmp_path / "pieces", cfg, RandomBatches(), until=until)
        assert (result.steps, result.finished) == (until, False)
        pieces = transfer_model()
    assert fit_transfer(pieces, tmp_path / "pieces", cfg, RandomBatches()).finished
    assert numbers_of(tmp_path / "pieces") == numbers_of(tmp_path / "whole")
    for name, tensor in adapter_state(whole).items():
        assert torch.equal(tensor, adapter_state(pieces)[name]), name


def test_each_layer_has_its_own_schedule_best_weights_and_early_stopping(tmp_path: Path) -> None:
    """Layer 1's loss never improves: it stops with its initial weights while layer 0 continues."""

    class Lopsided:
        def __init__(self) -> None:
            self.inner, self.calls = transfer_objective(TransferConfig()), 0

        def __call__(self, model: nn.Module, batch: Batch) -> Metrics:
            found = self.inner(model, batch)
            if not torch.is_grad_enabled():
                self.calls += 1
                found |= {"loss/layer_00": 9.0 - self.calls, "loss/layer_01": 9.0 + self.calls}
            return found

    model = transfer_model()
    before = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    cfg = transfer_settings(max_steps=12, eval_every=2, early_stopping=2, schedule="plateau", plateau_patience=0)
    result = fit_transfer(model, tmp_path, cfg, RandomBatches(), objective=Lopsided())
    assert (result.steps, result.early, result.best_step) == (12, False, 12)
    for name, tensor in adapter_state(model).items():
        assert torch.equal(tensor, before[name]) == (".layers.1." in name), name
    both = fit_transfer(transfer_model(), tmp_path / "whole", cfg, RandomBatches())
    assert both.best_loss <= both.initial_loss


def test_a_full_disk_stops_with_the_old_checkpoint_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = settings(max_steps=4, save_every=2)
    run_fit(tmp_path, Point(), distance, dataclasses.replace(cfg, max_steps=2))

    def full(*arguments: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        with pytest.raises(SaveError, match=r"disk is full while saving .*step-00000004"):
            run_fit(tmp_path, Point(), distance, cfg)
    assert kept(tmp_path)[-1] == "step-00000002"
    assert run_fit(tmp_path, Point(), distance, cfg).resumed_from == 2


def test_ctrl_c_stops_between_micro_batches_and_loses_nothing(tmp_path: Path) -> None:
    class Impatient(RandomBatches):
        def train_batch(self, index: int) -> dict[str, torch.Tensor]:
            if index == 11:
                os.kill(os.getpid(), signal.SIGINT)
            return super().train_batch(index)

    before = signal.getsignal(signal.SIGINT)
    cfg = transfer_settings()
    result = fit_transfer(transfer_model(), tmp_path / "cut", cfg, Impatient())
    assert result.stopped
    assert signal.getsignal(signal.SIGINT) is before
    assert kept(tmp_path / "cut", "transfer")[-1] == f"step-{result.steps:08d}"
    model, whole = transfer_model(), transfer_model()
    assert fit_transfer(model, tmp_path / "cut", cfg, RandomBatches()).resumed_from == result.steps
    fit_transfer(whole, tmp_path / "whole", cfg, RandomBatches())
    assert numbers_of(tmp_path / "cut") == numbers_of(tmp_path / "whole")
    for name, tensor in adapter_state(whole).items():
        assert torch.equal(tensor, adapter_state(model)[name]), name


# What cannot be trained


def test_a_nan_in_a_student_names_layer_and_step(tmp_path: Path) -> None:
    model = transfer_model(layers=3)
    hits = []

    def spoil(module: nn.Module, inputs: Any, kwargs: Any) -> None:
        hits.append(1)
        if len(hits) == 7:
            with torch.no_grad():
                students_of(model)[1].mix_H[0] = math.nan

    model.model.register_forward_pre_hook(spoil, with_kwargs=True)
    with pytest.raises(
        NonFiniteLoss, match=r"transfer: the loss is not finite at step 3, first in layer 1\b"
    ) as caught:
        fit_transfer(model, tmp_path, transfer_settings(eval_every=100), RandomBatches())
    assert (caught.value.step, caught.value.where) == (3, "layer 1")
    assert kept(tmp_path, "transfer") == ["step-00000000"]


def test_a_nan_in_stage_two_names_the_module(tmp_path: Path) -> None:
    model, cfg = transfer_model(layers=3), lora_settings()
    start_lora(model, cfg)
    model.model.layers[2].mlp.register_forward_hook(lambda module, inputs, output: output * math.nan)
    with pytest.raises(NonFiniteLoss, match=r"step 0, first in layer 2 \(model\.layers\.2\.mlp\)"):
        fit_lora(model, tmp_path, cfg, RandomBatches())


def test_an_infinite_gradient_names_the_layer(tmp_path: Path) -> None:
    model, cfg = transfer_model(), transfer_settings()

    def overflow(model: nn.Module, batch: Batch) -> Metrics:
        metrics = transfer_objective(cfg)(model, batch)
        if torch.is_grad_enabled():
            students_of(model)[1].mix_H.grad.fill_(math.inf)
        return metrics

    with pytest.raises(NonFiniteLoss, match="gradient norm is not finite at step 1, first in layer 1"):
        run_fit(tmp_path, model, overflow, cfg)


def test_nothing_to_train_wrong_precision_and_no_validation(tmp_path: Path) -> None:
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        run_fit(tmp_path, model, distance, settings())
    with pytest.raises(ValueError, match="must be float32"):
        run_fit(tmp_path, Point().bfloat16(), distance, settings())

    class NoValidation(RandomBatches):
        def validation_batches(self) -> int:
            return 0

    with pytest.raises(UserError, match=r"data\.validation_rows"):
        run_fit(tmp_path, Point(), distance, settings(), NoValidation())


# The frozen teacher


def test_a_half_precision_teacher_and_float32_students(tmp_path: Path) -> None:
    model = transfer_model().bfloat16()
    for student in students_of(model).values():
        student.float()
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    result = fit_transfer(model, tmp_path, transfer_settings(), RandomBatches())
    assert result.best_loss < result.initial_loss
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
        else:
            assert torch.equal(parameter, before[name]), name


def test_both_stages_learn(tmp_path: Path) -> None:
    model = transfer_model()
    first = fit_transfer(model, tmp_path, transfer_settings(max_steps=20), RandomBatches())
    assert first.best_loss < 0.9 * first.initial_loss
    cfg = lora_settings(max_steps=20, dropout=0.0)
    start_lora(model, cfg)
    second = fit_lora(model, tmp_path, cfg, RandomBatches())
    train = [line["loss"] for line in read_metrics(tmp_path) if line["kind"] == "train" and line["stage"] == "lora"]
    assert sum(train[-4:]) < sum(train[:4])
    assert second.steps == 20


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_mixers_have_their_own_rate(schedule: str, scope: str) -> None:
    """AdamW's first step moves every parameter by its rate."""
    model = transfer_model()
    cfg = lora_settings(
        lr=1e-3, mixer_lr=2e-2, schedule=schedule, clip_scope=scope, warmup_steps=0, clip=None, loss="ce", dropout=0.0
    )
    start_lora(model, cfg)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = ParamGroups(clip_groups(model, trainable, scope), cfg, 10, rate_factors(model, trainable, cfg))
    optimizer = torch.optim.AdamW(groups.for_optimizer(), lr=cfg.lr)
    assert groups.set_rates(optimizer, 0) == pytest.approx(1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(trainable)
    for name, parameter in trainable.items():
        assert rates[id(parameter)] == pytest.approx(2e-2 if ".student." in name else 1e-3), name
    assert rate_factors(model, trainable, replace(cfg, mixer_lr=None)) == {}
