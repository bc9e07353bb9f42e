"""lm-evaluation-harness 0.4.13 for linearized models: a model class for the harness, and its task scores as records.

The model is registered under the name ``trenchcoat``. The harness does not discover models in other packages,
so its command line has to be started from here: ``trenchcoat lm-eval ...`` or ``python -m
trenchcoat.evaluation.harness``, with the harness's own arguments. Several processes (``accelerate launch -m
trenchcoat.evaluation.harness ...``) each score a share of the rows, by the harness's own data parallelism.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval.api.model
import lm_eval.api.task
import torch
from accelerate import Accelerator
from lm_eval import simple_evaluate
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from trenchcoat.config import UserError
from trenchcoat.evaluation.loglikelihood import LoglikelihoodScorer, Request
from trenchcoat.evaluation.mmlu import task_folder
from trenchcoat.evaluation.statistics import Estimate
from trenchcoat.evaluation.task import EvalTask, ScoredModel, TaskPlan
from trenchcoat.evaluation.task_results import ModelScore, TaskRecord
from trenchcoat.models import hub
from trenchcoat.models.attach import mode_of, set_far, set_mode
from trenchcoat.models.lora import remove_lora
from trenchcoat.models.stage2 import holds_teacher
from trenchcoat.models.text import clean_text

MODEL_NAME = "trenchcoat"
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""The harness's own defaults."""
HARNESS_DEVICE = "cuda:0"
"""The default device of the harness's command line."""
RECENT = 16
"""Texts whose token ids are cached."""
CPU_ROWS = 16
"""Batch size for generation and rolling likelihood on a CPU, where the harness cannot find one automatically."""


class TrenchcoatLM(HFLM):
    """A linearized model in the harness. Likelihoods go through :class:`LoglikelihoodScorer`: contexts are read whole
    unless ``max_length`` is given (the harness cuts them at the trained length), and shared prefixes are read once.

    Args (as ``--model_args path=DIR,teacher=true``):
        path: run, adapter or merged folder.
        teacher: score the base model's own softmax attention, without LoRA, instead.
        far: False switches the far part off.
        base: where the base model is, if it has moved.
        batch_size: rows per forward pass, or `auto`.
        max_length: tokens of context and continuation to keep, cut from the left.
        share: read shared prefixes once.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        model: Any = None,
        tokenizer: Any = None,
        teacher: bool = False,
        far: bool = True,
        base: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = "auto",
        max_batch_size: int = 64,
        max_length: int | None = None,
        share: bool = True,
        **unknown: Any,
    ) -> None:
        if unknown:
            known = "path, teacher, far, base, device, dtype, batch_size, max_batch_size, max_length, share"
            raise UserError(f"--model_args has {', '.join(unknown)}, which trenchcoat does not know; expected {known}")
        accelerator = Accelerator() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
        if model is None:
            if path is None:
                raise UserError("--model trenchcoat needs --model_args path=DIR (a run, an adapter or a merged folder)")
            where = str(accelerator.device) if accelerator is not None else _usable(device)
            model, tokenizer = hub.load(path, device=where, dtype=dtype, base=base)
            if teacher:
                become_teacher(model)
            set_far(model, far)
        self._encode_plain = functools.lru_cache(RECENT)(super().tok_encode)
        with _quietly():  # it warns about model objects and several processes; both are handled below
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=self._harness_batch(batch_size, model),
                max_batch_size=max_batch_size,
                max_length=max_length,
            )
        if accelerator is not None:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        rows = None if str(batch_size).startswith("auto") else int(batch_size)
        self.path, self.scorer = path, LoglikelihoodScorer(model, batch_size=rows, share=share)
        self.asked: dict[tuple[str, str], Request] = {}
        """Token ids of the requests scored, by their texts."""

    @staticmethod
    def _harness_batch(batch_size: int | str, model: Any) -> int | str:
        """Batch size of the harness's own calls (generation, rolling likelihood); its automatic one needs a GPU."""
        on_cpu = str(batch_size).startswith("auto") and model.device.type == "cpu"
        return CPU_ROWS if on_cpu else batch_size

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """As the harness's, with a small cache: the choices of a question share their context."""
        string = clean_text(string)
        if add_special_tokens is None and left_truncate_len is None and not kwargs:
            return self._encode_plain(string)
        found: list[int] = super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        return found

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(sum of log p, every token is the first choice) of each (strings, context ids, continuation ids)."""
        asked = [self._cut(context, continuation) for _, context, continuation in requests]
        answers = [(answer.logprob, answer.greedy) for answer in self.scorer.scores(asked)]
        for (strings, _, _), request, answer in zip(requests, asked, answers, strict=True):
            if strings is not None:
                self.asked[strings] = request
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> Request:
        """Cut the context from the left so that the model reads at most ``max_length`` tokens."""
        if self._max_length is None:
            return Request(context, continuation)
        room = self._max_length + 1 - len(continuation)
        if room < 1:
            raise UserError(
                f"a continuation of {len(continuation)} tokens does not fit max_length={self._max_length}; raise it"
            )
        return Request(context[-room:], continuation)

    def get_model_info(self) -> dict[str, Any]:
        """What was scored, for the harness's results."""
        return {
            "path": self.path,
            "mode": mode_of(self.model),
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
        }


def _usable(device: str | None) -> str:
    """The requested device, but the CPU for the harness's default cuda:0 on a machine without a GPU."""
    if device == HARNESS_DEVICE and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("%s is not available; the model runs on the CPU", device)
        return "cpu"
    return device or "auto"


if MODEL_NAME not in model_registry:
    model_registry.register(MODEL_NAME, target=TrenchcoatLM)


def become_teacher(model: Any) -> None:
    """Turn a run or adapter back into its base model: own attention, no LoRA. Raises ``UserError`` for other models."""
    if not holds_teacher(model):
        raise UserError(
            "a merged folder (or one of lora.train=all) no longer holds its teacher's weights: give the teacher's own "
            "folder (--teacher DIR), or score the run or adapter folder"
        )
    remove_lora(model)
    set_mode(model, "teacher")


def task_manager(names: Sequence[str], *, task_dir: Path | None, data_dir: Path | None) -> TaskManager:
    """The harness's index of our task files (given ``data_dir``), the user's, and where needed the harness's own.

    Raises ``UserError`` for an unknown name.
    """
    paths: list[Path] = []
    metadata = {}
    if data_dir is not None:
        paths.append(task_folder())
        metadata["data_dir"] = str(data_dir)
    if task_dir is not None:
        if not task_dir.is_dir() or not any(task_dir.glob("**/*.yaml")):
            raise UserError(f"--task-dir {task_dir}: no task file (*.yaml) in it")
        paths.append(task_dir)
    manager = TaskManager(include_path=[*paths], include_defaults=False, metadata=metadata) if paths else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=[*paths] or None, metadata=metadata)
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise UserError(
                f"--tasks has {name!r}, which neither the harness nor your files know{hint}; "
                "`trenchcoat eval --help` lists the tasks that do not need the harness"
            )
    return manager


def load_tasks(manager: TaskManager, names: Sequence[str]) -> list[Any]:
    """The harness's groups and tasks of these names, with their data. Raises ``UserError`` when it cannot be loaded."""
    try:
        loaded = manager.load([*names])
        groups = [group for name, group in loaded.get("groups", {}).items() if name in names]
        inside = {task.task_name for group in groups for task in group.get_all_tasks()}
        return [*groups, *(task for name, task in loaded["tasks"].items() if name not in inside)]
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"cannot load --tasks {','.join(names)}: {' '.join(str(error).split())[:300]}. Without a network give the "
            "files: --data-dir DIR (MMLU's CSV files, the commonsense JSONL files), or --task-dir with your own"
        ) from error


def score_tasks(
    lm: TrenchcoatLM,
    names: Sequence[str],
    plan: TaskPlan,
    *,
    model_name: str,
) -> dict[str, TaskRecord]:
    """Score tasks; returns records with this model's scores under ``model_name``; {} on all but the first process."""
    manager = task_manager(names, task_dir=plan.task_dir, data_dir=plan.data_dir)
    with _quietly():
        found = simple_evaluate(
            model=lm,
            tasks=load_tasks(manager, names),
            num_fewshot=plan.num_fewshot,
            limit=plan.limit,
            task_manager=manager,
            random_seed=SEEDS["random"],
            numpy_random_seed=SEEDS["numpy"],
            torch_random_seed=SEEDS["torch"],
            fewshot_random_seed=SEEDS["fewshot"],
        )
    if found is None:
        return {}
    more = {
        "limit": plan.limit,
        "max_length": lm._max_length,
        "seeds": SEEDS,
        "data": "local" if plan.data_dir or plan.task_dir else "hub",
        "harness": found["lm_eval_version"],
    }
    records = {name: _record(name, found, model_name, more) for name in found["results"]}
    read: Mapping[tuple[str, str], Request] = getattr(lm, "asked", {})  # a plain model of the harness has none
    for name, record in records.items():
        pairs = [pair for leaf in record.members or [name] for pair in _texts(found, leaf)]
        asked = [read[pair] for pair in pairs if pair in read]
        record.past_2w = plan.past_2w(asked) if asked else None
    return records


def _texts(found: Mapping[str, Any], task: str) -> list[tuple[str, str]]:
    """(context, continuation) of everything that a task's rows asked for."""
    asked = [arguments for sample in found["samples"].get(task, []) for arguments in sample["arguments"]]
    return [(one[0], one[1]) for one in asked if len(one) == 2 and isinstance(one[1], str)]


class HarnessTasks(EvalTask):
    """Tasks of the harness, scored together."""

    description = "the harness's"
    every_process = True

    def __init__(self, path: str, names: Sequence[str]) -> None:
        self.path, self.names, self.name = path, names, ",".join(names)

    def score(self, model: ScoredModel, plan: TaskPlan) -> dict[str, TaskRecord]:
        """Records of the tasks, and of the tasks in groups."""
        lm = TrenchcoatLM(
            self.path,
            model=model.scorer.model,
            tokenizer=model.tokenizer,
            batch_size=plan.batch_size or "auto",
            max_length=plan.max_length,
        )
        lm.scorer = model.scorer
        return score_tasks(lm, self.names, plan, model_name=model.name)


def _record(name: str, found: Mapping[str, Any], model_name: str, more: Mapping[str, Any]) -> TaskRecord:
    metrics, rows = {}, {}
    numbers = found["results"][name]
    samples = sorted(found["samples"].get(name, []), key=lambda sample: int(sample["doc_id"]))
    for key, value in numbers.items():
        metric, comma, kind = str(key).partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = numbers.get(f"{metric}_stderr,{kind}")
        shown = metric if kind == "none" else str(key)
        metrics[shown] = Estimate(float(value), float(error) if isinstance(error, int | float) else math.nan)
        values = [sample.get(metric) for sample in samples if sample["filter"] == kind]
        if values and all(isinstance(one, int | float) for one in values):
            rows[shown] = [float(one) for one in values]
    members = _leaves(name, found["group_subtasks"])
    identity = "".join(f"{sample['doc_hash']}{sample['prompt_hash']}" for sample in samples)
    shots = {found["n-shot"].get(leaf) for leaf in members or [name]}
    return TaskRecord(
        name=name,
        alias=str(numbers.get("alias", name)).strip(" -"),
        count=sum(int(found["n-samples"][leaf]["effective"]) for leaf in members or [name]),
        rows_id=hashlib.sha256(identity.encode()).hexdigest()[:16] if identity else "",
        members=members,
        settings={"fewshot": shots.pop() if len(shots) == 1 else None, "version": found["versions"].get(name), **more},
        scores={model_name: ModelScore(metrics, rows)},
    )


def _leaves(name: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks under a group, in order; empty for a task."""
    found: list[str] = []
    for child in subtasks.get(name, []):
        found += _leaves(child, subtasks) or [child]
    return found


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide the harness's progress bars (one per subject) and log messages (two per subject); errors are still shown."""
    modules = (lm_eval.api.task, lm_eval.api.model)
    bars = [module.tqdm for module in modules]
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    for module, bar in zip(modules, bars, strict=True):
        module.tqdm = functools.partial(_no_bar, bar)
    try:
        yield
    finally:
        logger.setLevel(level)
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar


def _no_bar(bar: Any, *args: Any, **kwargs: Any) -> Any:
    return bar(*args, **{**kwargs, "disable": True})


def harness_command() -> None:
    """The harness's own command line, with ``--model trenchcoat`` registered."""
    cli_evaluate()


if __name__ == "__main__":
    harness_command()
