"""The rows of the report: which variants of the model are compared, and what each one shows.

To add a row, write a class here and list it in ``REPORT_ROWS``. A row only defines how its model is built; the stages
of ``trenchcoat.conversion`` train and score it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from trenchcoat.config import Recipe, StudentConfig
from trenchcoat.runtime.runfolder import (
    CONSTANT_LORA,
    CONSTANT_TRANSFER,
    LORA,
    LORA_ONLY,
    TEACHER_LORA,
    TRANSFER,
    WINDOW_SINKS_LORA,
    constant_student,
)
from trenchcoat.students import student_class


@dataclass(frozen=True)
class Variant:
    """How the model of a row is built from the base model of a run."""

    stage: str | None = None
    """The training stage whose weights it uses; None: untrained students."""
    teacher: bool = False
    """The base model with its own attention."""
    student: StudentConfig | None = None
    """A student that replaces the recipe's."""
    far: bool = True
    """False switches the far part off."""

    @property
    def lora(self) -> bool:
        """Whether its stage trains LoRA."""
        return self.stage not in (None, TRANSFER, CONSTANT_TRANSFER)


class ReportRow:
    """One row of the report: its texts, its line in the plots, and its model."""

    name: ClassVar[str]
    """Its key in ``results.json``."""
    label: ClassVar[str]
    """Its name in tables and plots."""
    description: ClassVar[str]
    """Its explanation in the report; ``{sinks}`` is the recipe's number of sinks."""
    stage: ClassVar[str | None] = None
    """The training stage that produces it, if any."""
    baseline: ClassVar[bool] = False
    """Its stage is trained only for comparison, if the recipe has ``eval.baselines``."""
    question: ClassVar[str] = ""
    """What the report asks about the converted model against this row; empty: no question."""
    colour: ClassVar[str] = "#666666"
    line: ClassVar[Any] = "-"

    def student(self, recipe: Recipe) -> StudentConfig | None:
        """The student that replaces the recipe's, if any."""
        return None

    def variant(self, recipe: Recipe) -> Variant | None:
        """The row's model under a recipe; None if the recipe does not include the row."""
        asked = self.stage in (None, *own_stages(recipe))
        if self.baseline and recipe.lora is not None and recipe.eval.baselines:
            asked = True
        return Variant(self.stage, student=self.student(recipe)) if asked else None


def own_stages(recipe: Recipe) -> list[str]:
    """The training stages that the recipe's own model goes through."""
    stage_1 = [TRANSFER] if recipe.transfer is not None else []
    stage_2 = [LORA if recipe.transfer is not None else LORA_ONLY] if recipe.lora is not None else []
    return stage_1 + stage_2


def window_sinks_student(recipe: Recipe) -> StudentConfig:
    """Window and sinks beside what the recipe keeps of the softmax attention, as the model computes it: no far part,
    nothing to train."""
    return dataclasses.replace(recipe.student, name="window_sinks", sinks=recipe.eval.sinks, kept_log_scale=None)


def keeps_groups(recipe: Recipe) -> bool:
    """Whether the recipe keeps softmax attention somewhere."""
    return bool(recipe.student.keep or recipe.student.keep_softmax)


def _trains_mixers_alone(recipe: Recipe) -> bool:
    return recipe.lora is not None and recipe.lora.train == "mixer"


def exact_tokens(student: StudentConfig) -> int:
    """Tokens at the start of a row whose queries have their whole past in the near part."""
    kind = student_class(student.name).kind
    return {"terrace": 2, "sliding": 1, "linear": 0}[kind] * student.window


class TeacherRow(ReportRow):
    """The model that was converted."""

    name, label, description = "teacher", "teacher", "the original model."
    colour = "#000000"

    def variant(self, recipe: Recipe) -> Variant:
        """The base model."""
        return Variant(teacher=True)


class TeacherLoraRow(ReportRow):
    """The teacher after the same stage 2: what stage 2 does without any conversion."""

    name, label, stage = "teacher_lora", "teacher + stage 2", TEACHER_LORA
    description = (
        "the original model after as many steps of stage 2, by next-token loss (its divergence from itself is 0, so "
        "with lora.loss=kl there would be nothing to train). What it gains was learned from the kind of text, and not "
        "recovered from text past 2W."
    )
    baseline = True
    colour, line = "#000000", "--"

    def variant(self, recipe: Recipe) -> Variant | None:
        """The base model with LoRA; None where only mixers are trained, which it does not have."""
        if _trains_mixers_alone(recipe) or super().variant(recipe) is None:
            return None
        return Variant(self.stage, teacher=True)


class WindowSinksRow(ReportRow):
    """Window and sinks alone, untrained: 0 % of every gap."""

    name, label = "window_sinks", "window + sinks"
    description = (
        "each token sees the window and the first {sinks} tokens (*sinks*, which attract attention), and "
        "nothing else: no far part, no kept groups, no training. 0 % of every gap."
    )
    question = "Does it beat window + sinks without training?"
    colour = "#D55E00"
    line: ClassVar[Any] = "-."

    def student(self, recipe: Recipe) -> StudentConfig:
        """Nothing is kept."""
        return dataclasses.replace(window_sinks_student(recipe), keep=(), keep_softmax=())


class KeptWindowSinksRow(ReportRow):
    """The recipe's kept groups beside window and sinks, untrained."""

    name, label = "kept_window_sinks", "kept + window + sinks"
    description = (
        "the groups that the conversion keeps, with the teacher's attention, and window + sinks for all others: "
        "untrained. It costs as much memory as the conversion or less; training has to beat it to be worth anything."
    )
    question = "Does it beat the same kept groups with window + sinks, without training?"
    colour = "#A6761D"
    line: ClassVar[Any] = "-."

    def student(self, recipe: Recipe) -> StudentConfig:
        """What the recipe keeps, and no far part."""
        return window_sinks_student(recipe)

    def variant(self, recipe: Recipe) -> Variant | None:
        """Only where something is kept."""
        return super().variant(recipe) if keeps_groups(recipe) else None


class UntrainedRow(ReportRow):
    """Students without any training."""

    name, label = "untrained_swap", "untrained swap"
    description = "attention replaced, nothing trained."
    colour, line = "#8c8c8c", ":"


class TransferOnlyRow(ReportRow):
    """Stage 1 alone."""

    name, label, stage = "transfer_only", "transfer only", TRANSFER
    description = (
        "after *attention transfer*, which trains only the feature maps and mixing gates, so that each layer's output "
        "matches that of softmax attention."
    )
    colour = "#56B4E9"


class TransferLoraRow(ReportRow):
    """Both stages."""

    name, label, stage = "transfer_lora", "transfer + stage 2", LORA
    description = "attention transfer first, then stage 2, which trains the whole model; this is the conversion."
    colour = "#0072B2"


class ConstantRow(ReportRow):
    """The same conversion without kept groups."""

    name, label, stage = "constant", "nothing kept, stage 2", CONSTANT_LORA
    description = (
        "a second conversion by the same stages with the same settings, in which no group keeps softmax attention: "
        "the state has a constant size."
    )
    question = "Does it beat the same conversion with nothing kept?"
    colour, line = "#56B4E9", "--"

    def student(self, recipe: Recipe) -> StudentConfig:
        """Nothing is kept."""
        return constant_student(recipe)

    def variant(self, recipe: Recipe) -> Variant | None:
        """Where the recipe asks for it, goes through both stages and keeps something."""
        if not recipe.eval.constant or not keeps_groups(recipe) or len(own_stages(recipe)) < 2:
            return None
        return Variant(self.stage, student=self.student(recipe))


class FarOffRow(ReportRow):
    """The converted model with only its window."""

    name, label = "far_off", "same, far part off"
    description = (
        "the converted model with only its window and kept groups. It was trained with the far part in place, so the "
        "difference flatters the far part; the window + sinks rows are the fair comparison."
    )
    colour, line = "#CC79A7", "--"

    def variant(self, recipe: Recipe) -> Variant | None:
        """For students that still attend to something without their far part."""
        student = student_class(recipe.student.name)
        if not student.has_far or student.kind == "linear":
            return None
        return Variant(next(reversed(own_stages(recipe)), None), far=False)


class LoraOnlyRow(ReportRow):
    """Stage 2 without stage 1."""

    name, label, stage = "lora_only", "no transfer, stage 2", LORA_ONLY
    description = (
        "no transfer, but the same stage 2, which also trains the feature maps and mixing gates: what attention "
        "transfer is good for is the difference."
    )
    question = "Does it beat the same stage 2 without attention transfer?"
    baseline = True
    colour = "#E69F00"


class WindowSinksLoraRow(ReportRow):
    """Window and sinks with the conversion's stage 2."""

    name, label, stage = "window_sinks_lora", "window+sinks, stage 2", WINDOW_SINKS_LORA
    description = "window + sinks beside the kept groups, if any, with the same stage 2: no far part."
    question = "Does it beat window + sinks with the same stage 2?"
    baseline = True
    colour = "#009E73"
    line: ClassVar[Any] = (0, (5, 1, 1, 1, 1, 1))

    def student(self, recipe: Recipe) -> StudentConfig:
        """What the recipe keeps, and no far part."""
        return window_sinks_student(recipe)

    def variant(self, recipe: Recipe) -> Variant | None:
        """None where only mixers are trained: it has none."""
        return None if _trains_mixers_alone(recipe) else super().variant(recipe)


REPORT_ROWS: dict[str, ReportRow] = {
    row.name: row
    for row in (
        TeacherRow(),
        TeacherLoraRow(),
        WindowSinksRow(),
        KeptWindowSinksRow(),
        UntrainedRow(),
        TransferOnlyRow(),
        TransferLoraRow(),
        ConstantRow(),
        FarOffRow(),
        LoraOnlyRow(),
        WindowSinksLoraRow(),
    )
}
"""Every row by name, in table order. Add yours here."""

TEACHER, UNTRAINED, FAR_OFF = TeacherRow.name, UntrainedRow.name, FarOffRow.name
WINDOW, KEPT_WINDOW = WindowSinksRow.name, KeptWindowSinksRow.name
CONVERTED = (TransferLoraRow.name, TransferOnlyRow.name, LoraOnlyRow.name)
"""Rows that can be the converted model; the first that was scored is."""


def row_label(name: str) -> str:
    """The row's label; for an unregistered row (such as a folder) its name."""
    return REPORT_ROWS[name].label if name in REPORT_ROWS else name


def asked_rows(recipe: Recipe) -> dict[str, Variant]:
    """The rows of a recipe in the order they are computed: those of its own stages first."""
    found = {name: row.variant(recipe) for name, row in REPORT_ROWS.items()}
    variants = {name: variant for name, variant in found.items() if variant is not None}
    own = (None, *own_stages(recipe))
    return dict(sorted(variants.items(), key=lambda item: item[1].stage not in own))


def final_row(recipe: Recipe) -> str:
    """The row of the recipe's converted model: that of the last stage it trains."""
    stage = next(reversed(own_stages(recipe)), None)
    return next((row.name for row in REPORT_ROWS.values() if stage is not None and row.stage == stage), UNTRAINED)
