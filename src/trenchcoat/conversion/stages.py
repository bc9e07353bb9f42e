"""The commands, from recipe to report: the order of the stages, what is skipped and what is saved.

The steps of `linearize`: model variants (model, students, data) -> fit (transfer) -> fit (LoRA) -> adapter ->
comparison (all rows of the table; comparison rows are trained as needed) -> report. A killed command continues where
it stopped: finished stages and scores are read from the run's folder.
"""

from __future__ import annotations

import dataclasses
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from trenchcoat.config import Recipe, UserError, dump_recipe
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.config.units import in_words
from trenchcoat.conversion.comparison import Comparison, estimate_seconds, stages_behind, stages_of
from trenchcoat.conversion.held_out import evaluation_length, evaluation_rows
from trenchcoat.conversion.ready import check_ready
from trenchcoat.conversion.run import open_run
from trenchcoat.conversion.selection.run import select_groups
from trenchcoat.conversion.variants import GivenModel, ModelVariants, open_variants
from trenchcoat.data.load import load_batches
from trenchcoat.evaluation.report import run as report
from trenchcoat.evaluation.report.recommendation import recommendation
from trenchcoat.evaluation.report.selection import frontier_table
from trenchcoat.evaluation.results import RESULTS_FILE, Outcome, Results, Sample, Scores, StageFacts
from trenchcoat.evaluation.rows import asked_rows, own_stages, row_label
from trenchcoat.evaluation.scoring import score
from trenchcoat.evaluation.selection import SELECTION_FILE
from trenchcoat.models import hub
from trenchcoat.models.attach import student_config
from trenchcoat.models.card import measured_in
from trenchcoat.models.native import save_native
from trenchcoat.models.saving import require_uploadable, upload_folder
from trenchcoat.runtime import distributed
from trenchcoat.runtime.machine import check_machine
from trenchcoat.runtime.runfolder import (
    CONSTANT_LORA,
    CONSTANT_TRANSFER,
    LORA,
    LORA_ONLY,
    TEACHER_LORA,
    TRANSFER,
    WINDOW_SINKS_LORA,
    RunFolder,
)
from trenchcoat.runtime.runlog import show_line, show_progress
from trenchcoat.students import student_class

_TITLES = {
    TRANSFER: "attention transfer: feature maps learn to reproduce the softmax attention, layer by layer",
    LORA: "stage 2 on the transferred model",
    LORA_ONLY: "stage 2 without transfer",
    WINDOW_SINKS_LORA: "for comparison: stage 2 on window + sinks, without a linear part",
    TEACHER_LORA: "for comparison: stage 2 on the teacher, by next-token loss",
    CONSTANT_TRANSFER: "for comparison: attention transfer with nothing kept",
    CONSTANT_LORA: "for comparison: stage 2 with nothing kept",
}


def demo(recipe: Recipe) -> Outcome:
    """The whole pipeline of ``recipe``, after checking the machine; raises ``UserError`` when it is not ready."""
    return linearize(recipe, opening=check_machine(Path(recipe.run.dir)))


def linearize(recipe: Recipe, opening: Sequence[str] = (), given: GivenModel | None = None) -> Outcome:
    """Both stages, the adapter, the comparison rows, the report. Raises ``UserError``; ``Stopped`` after Ctrl-C.

    ``given``: the base model and its tokenizer, where they are in memory already; here and in the other stages.
    """
    if recipe.transfer is None and recipe.lora is None:
        raise UserError("transfer=null and lora=null together leave nothing to do; leave one of them out")
    began = time.monotonic()
    with open_variants(recipe, stages_of(recipe), given) as variants:
        check_ready(variants, stages_of(recipe), scored=True)
        _open(variants, opening)
        _announce_time(variants)
        own = own_stages(recipe)
        facts = {stage: _train(variants, stage) for stage in own}
        variants.export(own[-1])
        return _report(variants, facts, began)


def select(recipe: Recipe, reach: float | None = None, given: GivenModel | None = None) -> Outcome:
    """Score the key/value groups and choose those to keep; ``reach`` as in :func:`select_groups`."""
    with open_run(recipe, []) as run:
        found = select_groups(ModelVariants(run, given), reach)
    chosen = (
        f"kept: student.keep=[{','.join(found.kept)}]"
        if found.kept
        else (f"best groups: {', '.join(found.keep(12))} ...; nothing chosen: --keep 13% or --reach 95% chooses")
    )
    title = "Gap between window + sinks and the teacher, closed without training (%)"
    table = [frontier_table(found).as_rich(title, wrap=True)] if found.frontier else []
    return Outcome((*table, chosen, f"the selection: {Path(recipe.run.dir) / SELECTION_FILE}"), found)


def transfer(recipe: Recipe, given: GivenModel | None = None) -> Outcome:
    """Stage 1 alone; writes its adapter folder."""
    with open_variants(recipe, [TRANSFER], given) as variants:
        check_ready(variants, [TRANSFER])
        _open(variants)
        facts = _train(variants, TRANSFER)
        if variants.folder.result(variants.main_lora_stage) is None:
            variants.export(TRANSFER)
        return Outcome((_ended(facts), f"the adapter is in {variants.adapter}{next_stage(recipe)}"))


def next_stage(recipe: Recipe) -> str:
    """What to type after a transfer, as the end of a sentence; empty where the recipe has no stage 2."""
    return "" if recipe.lora is None else f"; the next stage is: trenchcoat finetune {shlex.quote(recipe.run.dir)}"


def finetune(recipe: Recipe, given: GivenModel | None = None) -> Outcome:
    """Stage 2 alone, on the transfer found in the run's folder (or without one, if the recipe has transfer=null)."""
    _require_transfer(recipe)
    with open_variants(recipe, own_stages(recipe), given) as variants:
        check_ready(variants, [variants.main_lora_stage])
        _open(variants)
        facts = _train(variants, variants.main_lora_stage)
        variants.export(variants.main_lora_stage)
        further = f"the adapter is in {variants.adapter}; score it with: trenchcoat eval {shlex.quote(recipe.run.dir)}"
        return Outcome((_ended(facts), further))


def evaluate_run(recipe: Recipe) -> Outcome:
    """Score a finished run (comparison rows are trained when the recipe asks for them) and write its report."""
    began = time.monotonic()
    with open_variants(recipe, stages_of(recipe)) as variants:
        missing = [stage for stage in own_stages(recipe) if variants.folder.result(stage) is None]
        if missing:
            unfinished = f"{recipe.run.dir} is not finished ({missing[0]} is missing)"
            raise UserError(f"{unfinished}: run `trenchcoat linearize {shlex.quote(recipe.run.dir)}`")
        check_ready(variants, stages_of(recipe), scored=True)
        return _report(variants, {stage: variants.train(stage) for stage in own_stages(recipe)}, began)


# Parts of the commands


def _require_transfer(recipe: Recipe) -> None:
    """Raise ``UserError`` when stage 2 needs a transfer that is not finished in the run's folder."""
    folder = RunFolder(recipe.run.dir)
    if recipe.transfer is None or folder.result(TRANSFER) is not None:
        return
    state = "is not finished" if folder.begun(TRANSFER) else "has not been run"
    raise UserError(
        f"the attention transfer of this recipe {state} in {recipe.run.dir}: run `trenchcoat transfer` with the same "
        "recipe first, or set transfer=null for the baseline without it"
    )


def _open(variants: ModelVariants, opening: Sequence[str] = ()) -> None:
    """Record the recipe in the run's folder and log the run's settings."""
    recipe = variants.recipe
    variants.log.write_recipe(dump_recipe(recipe))
    for sentence in opening:
        variants.log.info(sentence)
    cls = student_class(recipe.student.name)
    maps = f"{recipe.student.feature_map.name} maps, " if cls.has_far and cls.has_maps else ""
    variants.log.info(
        f"run folder {recipe.run.dir}; model {recipe.model.path}; student {recipe.student.name} "
        f"(window {recipe.student.window}, {maps}{recipe.student.impl} operator)"
    )


def _announce_time(variants: ModelVariants) -> None:
    seconds = estimate_seconds(variants, stages_of(variants.recipe), len(asked_rows(variants.recipe)))
    if seconds > 0:
        variants.log.info(
            f"this will take about {in_words(seconds)} on this machine; if stopped, run the same command to continue"
        )


def _train(variants: ModelVariants, stage: str) -> StageFacts:
    if variants.folder.result(stage) is not None:
        variants.log.info(f"{stage}: already finished, skipped")
    else:
        variants.log.info(f"{stage}: {_TITLES[stage]}")
    return variants.train(stage)


def _ended(facts: StageFacts) -> str:
    return (
        f"{facts.name}: {facts.steps} steps, {facts.tokens} tokens in {in_words(facts.seconds)}, "
        f"best evaluation loss {facts.best_loss:.4g}"
    )


def _report(variants: ModelVariants, facts: dict[str, StageFacts], began: float) -> Outcome:
    """Score every row, training comparison rows as needed, and write the report."""
    comparison = Comparison(variants)
    scores: dict[str, Scores] = {}
    for row, variant in comparison.rows.items():
        for stage in stages_behind(variant, variants.recipe):
            if stage not in facts:
                facts[stage] = _train(variants, stage)
        scores[row] = found = comparison.scores(row)
        variants.log.info(
            f"scored {row_label(row)}: perplexity {found.perplexity:.4g}, past 2W {found.far_perplexity:.4g}"
        )
    results = comparison.results(scores, list(facts.values()), began)
    written = distributed.from_main(lambda: report.write_report(variants.recipe.run.dir, results))
    samples = [text for sample in results.samples for text in _side_by_side(sample)]
    shown = (
        *samples,
        f"\n{recommendation(results)}\n",
        report.terminal_table(results),
        report.terminal_verdicts(results),
        f"the whole report: {written}",
    )
    return Outcome(shown, results)


def _side_by_side(sample: Sample) -> list[str]:
    """The end of a prompt and each model's continuation."""
    lines = ["", f"prompt ends: ...{sample.prompt[-160:]}"]
    for name, text in sample.outputs.items():
        lines.append(f"[{row_label(name)}]")
        lines += [f"    {line}" for line in text.splitlines() or [""]]
    return lines


# Models that are already on disk


def evaluate_folder(path: Path, recipe: Recipe) -> Outcome:
    """Score an adapter or merged folder, as it is, on the text of ``recipe``; what takes long is shown on standard
    error, as ``run.progress`` says."""
    display = recipe.run.progress
    show_line(f"loading {path}", display)
    model, tokenizer = hub.load(path, device=recipe.model.device)
    data = dataclasses.replace(  # selection applies to training rows, which are not needed
        recipe.data, seq_len=evaluation_length(recipe), select="none", select_rows=None
    )
    batches = load_batches(
        data,
        tokenizer,
        batch_size=recipe.eval.batch_size,
        seed=recipe.run.seed,
        say=lambda text: show_line(text, display),
    )
    window = student_config(model).window
    text = evaluation_rows(batches, recipe.eval.rows)
    with show_progress(f"scoring {path.name}", len(text.ids), display=display, unit="rows") as shown:
        found = score(model, text, window=window, batch_size=recipe.eval.batch_size, progress=shown.update)
    scores = Results(window, text.ids.shape[1], rows={path.name: found}, recipe=dataclasses.asdict(recipe))
    return Outcome((report.terminal_table(scores),), scores)


def export(path: Path, out: Path, *, merge: bool, dtype: str = "stored") -> Outcome:
    """Write the adapter (or, with ``merge``, the complete model) of a run or adapter folder to ``out``.

    ``dtype``: of the complete model's weights, as for ``trenchcoat.load``; `stored` is that of the base model's files.
    """
    _require_empty(out)
    if not merge:
        if (path / "config.json").is_file() and hub.find_adapter(path) is None:
            raise UserError(f"{path} is a complete model, which holds no adapter to write: give --merge")
        hub.save_adapter(hub.load(path)[0], out)
        return Outcome((f"the adapter is in {out}",))
    model, tokenizer = hub.load(path, dtype=dtype, device="cpu")
    hub.save_merged(model, out, tokenizer, report=_measured(path))
    return Outcome(
        (
            f"the complete model is in {out} ({str(model.dtype).removeprefix('torch.')}): "
            "AutoModelForCausalLM.from_pretrained opens it after `import trenchcoat`, or with trust_remote_code=True",
        )
    )


def export_native(path: Path, out: Path, *, dtype: str = "stored") -> Outcome:
    """Write the model of a run, adapter or complete folder to ``out`` as one of a class that Transformers ships.

    ``dtype`` as for :func:`export`. Raises ``UserError`` for a model that the class cannot hold.
    """
    _require_empty(out)
    model, tokenizer = hub.load(path, dtype=dtype, device="cpu")
    save_native(model, out, tokenizer, report=_measured(path))
    return Outcome(
        (
            f"the complete model is in {out} ({str(model.dtype).removeprefix('torch.')}), of Transformers' class "
            "Qwen3_5ForCausalLM: it opens without trenchcoat, in Transformers and vLLM",
        )
    )


def publish(
    path: Path, name: str, out: Path | None, *, dtype: str = "stored", native: bool = False, private: bool = False
) -> Outcome:
    """Upload the complete model of a run, adapter or complete folder to the hub as ``name``.

    ``native``: as :func:`export_native` writes it. ``out``: a folder to keep it in, too. Raises ``UserError`` when the
    hub refuses; before anything is loaded where the name or the login shows it.
    """
    require_uploadable(name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary) / "model"
        written = export_native(path, folder, dtype=dtype) if native else export(path, folder, merge=True, dtype=dtype)
        address = upload_folder(folder, name, private=private or None)
    return Outcome((*(written.shown if out is not None else ()), f"uploaded: {address}"))


def _require_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another folder")


def _measured(path: Path) -> str:
    """What a run's report (or the card of a complete folder) says of its model, in Markdown; empty without one."""
    if not (path / RESULTS_FILE).is_file():
        return measured_in(path)
    results = Results.load(path / RESULTS_FILE)
    trained = [f"- {_ended(stage)}" for stage in results.stages if stage.name in own_stages(load_recipe(path))]
    tables = [line for table in report.report_tables(results) for line in table.as_markdown()]
    return "\n".join([recommendation(results), "", *tables, *trained])
