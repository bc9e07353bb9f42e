"""What can be known before training is checked before training: hours of stage 1 are not lost to a setting of stage 2.

:func:`check_ready` goes through every stage that is still to be trained: the model is assembled and frozen as the stage
will do it, its text is read, and the disk is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trenchcoat.config import LoraConfig, Recipe, StageConfig, UserError
from trenchcoat.config.keep import needs_selection
from trenchcoat.config.paths import require_writable
from trenchcoat.conversion.held_out import evaluation_length
from trenchcoat.conversion.selection.run import selection_length, with_groups
from trenchcoat.data.batches import Batches
from trenchcoat.models.lora import lora_targets
from trenchcoat.models.shapes import positions_of
from trenchcoat.planning.footprint import checkpoint_bytes
from trenchcoat.runtime import distributed
from trenchcoat.runtime.machine import require_disk
from trenchcoat.training.schedules import evaluation_batches, training_length
from trenchcoat.training.stored import token_bytes

if TYPE_CHECKING:
    from trenchcoat.conversion.variants import ModelVariants


def check_ready(variants: ModelVariants, stages: Sequence[str], *, scored: bool = False) -> None:
    """Raise ``UserError`` for what would stop one of the ``stages`` later, or (``scored``) the scoring after them; a
    collective. Finished stages are left out; without others nothing is loaded."""
    left = distributed.from_main(lambda: [stage for stage in stages if variants.folder.result(stage) is None])
    if not left:
        return
    asked = variants.recipe
    if needs_selection(asked.student):
        selection_length(asked)
        variants.recipe = with_groups(asked, ())  # the groups are not known yet
    try:
        check_settings(variants.recipe, variants.model)
        needs = []
        for stage in left:
            cfg = variants.stage_config(stage)
            needs.append((variants.folder.directory, _stage_bytes(variants.rehearse(stage), cfg), stage))
            batches = variants.batches(cfg.batch_size, variants.recipe.row_tokens(cfg))
            needs += _teacher_logits(cfg, batches, variants.model, variants.recipe.row_tokens(cfg))
        if scored:
            variants.batches(variants.recipe.eval.batch_size, evaluation_length(variants.recipe))
    finally:
        variants.recipe = asked
    distributed.from_main(lambda: require_disk(needs))


def check_settings(recipe: Recipe, model: Any) -> None:
    """Raise ``UserError`` for rows longer than the model's positions, and for ``lora.targets`` that it does not have.

    ``model`` may be on the meta device.
    """
    positions = positions_of(model.config)
    lengths = {"data.seq_len": recipe.data.seq_len, "eval.seq_len": recipe.eval.seq_len}
    lengths["lora.seq_len"] = None if recipe.lora is None else recipe.lora.seq_len
    lengths["select.seq_len"] = recipe.select.seq_len if needs_selection(recipe.student) else None
    for name, tokens in lengths.items():
        if positions is not None and tokens is not None and tokens > positions:
            raise UserError(
                f"{name}={tokens} is longer than the {positions} positions of {recipe.model.path} "
                f"(max_position_embeddings of its config.json): set {name} to at most {positions}"
            )
    if recipe.lora is not None and recipe.lora.train == "lora":
        lora_targets(model, recipe.lora.targets)


def _stage_bytes(trained: int, cfg: StageConfig) -> float:
    """Bytes that a stage writes to the run's folder: its checkpoints, its weights, and the adapter."""
    return checkpoint_bytes(trained, cfg) + 2 * 4.0 * trained


def _teacher_logits(cfg: StageConfig, batches: Batches, model: Any, seq_len: int) -> list[tuple[Path, float, str]]:
    """What a stage writes to the folder of ``lora.teacher_logits``, which must be writable."""
    if not isinstance(cfg, LoraConfig) or cfg.teacher_logits is None:
        return []
    folder = Path(cfg.teacher_logits)
    distributed.from_main(lambda: require_writable(folder / "train" / "manifest.json", "lora.teacher_logits"))
    rows = min(training_length(cfg, len(batches))[0] * cfg.batch_size, batches.rows("train"))
    rows += evaluation_batches(cfg, batches.validation_batches()) * cfg.batch_size
    width = token_bytes(model.get_output_embeddings().weight.shape[0])
    return [(folder, float(rows * seq_len * width), "the teacher's logits")]
