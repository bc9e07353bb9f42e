"""The command line: subcommands, help, exit codes (0 done, 1 failed, 2 wrong usage). No logic lives here."""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from trenchcoat.cli import blocks as cli_blocks
from trenchcoat.cli import evaluation as cli_eval
from trenchcoat.cli import generation as writing
from trenchcoat.cli import interop as cli_interop
from trenchcoat.config import Recipe, UsageError, UserError
from trenchcoat.config.recipe_io import builtin_recipes, load_recipe, settings_help

DESCRIPTION = """\
Turn a pretrained softmax Transformer into a linear-time, constant-memory model.

  trenchcoat demo                              the whole pipeline on a small embedded model, minutes on a laptop
  trenchcoat linearize llama3_1_8b             the same for Llama 3.1 8B, on one GPU
  trenchcoat generate runs/llama3_1_8b --prompt "A trenchcoat is"

`trenchcoat COMMAND --help` explains a command and every setting it reads.
"""

RECIPE_HELP = f"a YAML file, a run's folder, or a recipe that ships: {', '.join(builtin_recipes())}"
OVERRIDE_HELP = "settings that override the recipe's, by path: transfer.lr=5e-3 student.name=linear transfer=null"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["lm-eval"]:  # what follows is the harness's grammar
        return guarded(lambda: cli_eval.run_lm_eval(arguments[1:]), debug=False)
    args = _parse(arguments)
    return guarded(lambda: args.command(args), debug=args.debug)


def guarded(action: Callable[[], None], *, debug: bool) -> int:
    """Run ``action``; an error becomes one line on standard error (with ``debug`` after its traceback) and a code."""
    _quiet_libraries(debug)
    try:
        action()
    except KeyboardInterrupt:
        return _failed("stopped; run the same command again to continue where it was", 1, debug)
    except UsageError as error:
        return _failed(str(error), 2, debug)
    except UserError as error:
        if error.reported and not debug:
            return 1
        return _failed(str(error), 1, debug)
    except (ValueError, OSError) as error:
        return _failed(f"{error} ({type(error).__name__}; --debug shows where)", 1, debug)
    return 0


def warn(message: str) -> None:
    """One line on standard error; of several processes the first one says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"trenchcoat: {' '.join(message.split())}", file=sys.stderr)


def _failed(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    rank = os.environ.get("RANK", "0")
    who = "trenchcoat" if rank == "0" else f"trenchcoat, process {rank}"
    print(f"{who}: {' '.join(message.split())}", file=sys.stderr)
    return code


def _quiet_libraries(debug: bool) -> None:
    """Keep the libraries' own notices and bars off the terminal; ours say what matters."""
    if debug:
        return
    from datasets import disable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


# The parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(shutil.get_terminal_size().columns, 120))


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parse; overrides may stand anywhere among the options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    strange = [item for item in rest if item.startswith("-") or "=" not in item or not hasattr(args, "overrides")]
    if strange:
        _usage(parser, f"unrecognized arguments: {' '.join(strange)}")
    if hasattr(args, "overrides"):
        args.overrides = [*args.overrides, *rest]
    return args


def _usage(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    parser.error(message)


def build_parser() -> argparse.ArgumentParser:
    """The whole grammar."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", help="show the traceback of an error, and the libraries' notices"
    )
    parser = argparse.ArgumentParser(
        "trenchcoat", description=DESCRIPTION, formatter_class=_Formatter, parents=[common]
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, run: Any, short: str, more: str, sections: Sequence[str] | None = (), *, to: Any = commands
    ) -> argparse.ArgumentParser:
        settings = "" if sections is not None and not sections else "settings:\n" + settings_help(sections)
        sub: argparse.ArgumentParser = to.add_parser(
            name, help=short, description=more, epilog=settings, formatter_class=_Formatter, parents=[common]
        )
        sub.set_defaults(command=run)
        return sub

    def recipe_command(
        name: str, run: Any, short: str, more: str, sections: Sequence[str] | None = None, *, to: Any = commands
    ) -> argparse.ArgumentParser:
        sub = add(name, run, short, more, sections, to=to)
        sub.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
        sub.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=OVERRIDE_HELP)
        return sub

    demo = add("demo", _demo, "the whole pipeline on the embedded model, minutes on two CPU cores", _DEMO, None)
    demo.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=OVERRIDE_HELP)
    recipe_command("linearize", _linearize, "transfer, LoRA, evaluation, export and report of one recipe", _LINEARIZE)
    both = ["model", "student", "data", "run"]
    recipe_command("transfer", _transfer, "stage 1 alone: attention transfer", _TRANSFER, [*both, "transfer"])
    recipe_command("finetune", _finetune, "stage 2 alone: LoRA on the transferred model", _FINETUNE, [*both, "lora"])
    plan = recipe_command("plan", _plan, "what a recipe needs: memory, time and disk, before anything runs", _PLAN, ())
    cli_blocks.add_machine(plan)
    plan.add_argument(
        "--simulate", action="store_true", help="also run a step of the real shapes on fake tensors: minutes, one CPU"
    )
    blocks = commands.add_parser(
        "blocks", help=cli_blocks.SHORT, description=cli_blocks.MORE, formatter_class=_Formatter
    )
    actions = blocks.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, action in cli_blocks.ACTIONS.items():
        run = functools.partial(_block_action, action)
        action.options(recipe_command(name, run, action.short, action.more, action.sections, to=actions))
    _add_eval(add("eval", _eval, "score a run, an adapter or a merged folder", _EVAL, ["data", "eval"]))
    cli_eval.add_report(add("report", _runs, "any number of runs side by side", cli_eval.REPORT))
    add("lm-eval", _eval, "the evaluation harness's own command line, with our models", cli_eval.LM_EVAL)
    writing.add_generate(add("generate", writing.generate, "write text with a linearized model", writing.GENERATE))
    writing.add_chat(add("chat", writing.chat, "talk with a linearized model", writing.CHAT))
    _add_bench(add("bench", _bench, "measure the operator, a transfer step or decoding here", _BENCH))
    _add_export(add("export", _export, "write the adapter, or a merged model, of a run", _EXPORT))
    cli_interop.add_commands(add, show)
    return parser


_DEMO = """\
Linearize the small Llama that ships with trenchcoat, on text that every Python carries: check the machine, attention
transfer, LoRA, evaluation, texts of both models side by side, the report. Nothing is downloaded. Killed or stopped,
the same command continues. Any setting can be overridden, for example: trenchcoat demo student.window=16
"""
_LINEARIZE = """\
Run a whole recipe: attention transfer, LoRA, evaluation, export of the adapter, report. Everything goes into the run's
folder (run.dir). Run the same command again after a crash or Ctrl-C and it continues; finished stages are skipped.
"""
_TRANSFER = """\
Stage 1: train each layer's feature maps so that the linear attention reproduces the softmax attention's outputs. The
model itself is frozen, and no gradient passes through it.
"""
_FINETUNE = """\
Stage 2: LoRA on the attention projections with next-token loss. It takes up the transfer found in the run's folder
(made by `trenchcoat transfer` with the same recipe); with transfer=null it is the baseline without transfer.
"""
_PLAN = """\
Say which ways of running a recipe fit a machine: one GPU, a copy on each, sharded over all (FSDP) or in each node
(HSDP), shards in host memory, a 4-bit base; with the memory of one GPU part by part, tokens/s and hours at a stated
MFU, and the disk. It is arithmetic on the model's sizes: no weights, no GPU, and no network for the models of the
shipped recipes.
"""
_EVAL = """\
Score a run again (with other eval.* settings, say) and write its report, or score an adapter or merged folder on the
text named by data.path. With --tasks: benchmarks through lm-evaluation-harness (piqa, mmlu, ...; --data-dir for local
files), mmlu_letters, and the long-context probes needle, recall and copy.
"""
_BENCH = """\
Measure on this machine. ops: the attention operator against the quadratic reference and PyTorch's own attention.
transfer: time and memory of an attention-transfer step against the bare teacher forward and the naive way. blocks:
memory and throughput of block-wise transfer against the joint run. clip: one gradient clip for all layers against one
for each, where the layers' scales differ 1000-fold. decode: time a token and state against the softmax teacher with its
KV cache, by context; batches; bfloat16 states; a long prompt. kernels: the Triton kernels on a GPU (--device cuda),
against the device's own ceilings, other attentions, and an 8B-shaped model with softmax attention; --out is written as
the measurements come in. tiles: find the kernels' fastest launch settings on this GPU and keep them by its name.
"""
_EXPORT = """\
Write what a run learned to a folder of its own: the adapter (feature maps, mixes, LoRA; needs the base model) or, with
--merge, a complete model that AutoModelForCausalLM loads after `import trenchcoat`.
"""


def _add_eval(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("target", metavar="RUN_OR_DIR", help="a run's folder, an adapter folder or a merged folder")
    sub.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=OVERRIDE_HELP)
    cli_eval.add_eval(sub)


def _add_bench(sub: argparse.ArgumentParser) -> None:
    known = ["ops", "transfer", "blocks", "clip", "decode", "kernels", "tiles"]
    sub.add_argument("what", choices=known, help="what to measure")
    sub.add_argument("--out", metavar="FILE", default=None, help="also write the result as JSON")
    sub.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads (default: torch's choice)")
    sub.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    sub.add_argument("--repeats", type=int, default=None, metavar="N", help="measurements each, their median counts")
    sub.add_argument("--quick", action="store_true", help="small sizes: a check that it runs, not a measurement")
    sub.add_argument("--only", metavar="PARTS", help="kernels: some of operator,model,decode (all)")
    sub.add_argument("--layers", type=int, metavar="N", help="kernels: depth of the models (4 for prefill, else 32)")


def _add_export(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("target", metavar="DIR", help="a run's folder or an adapter folder")
    sub.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--merge", action="store_true", help="a complete model instead of an adapter")
    form.add_argument("--to", choices=["lolcats"], default=None, help="the .pt files of the original LoLCATs code")


# The commands


def _recipe(args: argparse.Namespace, path: str) -> Recipe:
    try:
        return load_recipe(path, args.overrides)
    except UserError as error:
        raise UsageError(str(error)) from error


def _demo(args: argparse.Namespace) -> None:
    from trenchcoat.linearize import stages

    show(stages.demo(_recipe(args, "demo")))


def _linearize(args: argparse.Namespace) -> None:
    from trenchcoat.linearize import stages

    show(stages.linearize(_recipe(args, args.recipe)))


def _transfer(args: argparse.Namespace) -> None:
    from trenchcoat.linearize import stages

    show(stages.transfer(_recipe(args, args.recipe)))


def _finetune(args: argparse.Namespace) -> None:
    from trenchcoat.linearize import stages

    show(stages.finetune(_recipe(args, args.recipe)))


def _plan(args: argparse.Namespace) -> None:
    from trenchcoat.planning.plan_report import report_plan

    recipe = _recipe(args, args.recipe)
    machine, tokens = cli_blocks.machine_of(args)
    show(cli_blocks.kept(args, report_plan(recipe, machine, tokens=tokens, simulated=args.simulate)))


def _block_action(action: cli_blocks.Action, args: argparse.Namespace) -> None:
    show(action.run(_recipe(args, args.recipe), args))


def _eval(args: argparse.Namespace) -> None:
    from trenchcoat.linearize import stages

    try:
        recipe = cli_eval.text_recipe(args.target, args.overrides)
    except UserError as error:
        raise UsageError(str(error)) from error
    if args.tasks is not None:
        show(cli_eval.run_tasks(args, recipe))
    elif (Path(args.target) / "recipe.yaml").is_file():
        show(stages.evaluate_run(recipe))
    else:
        show(stages.evaluate_folder(Path(args.target), recipe))


def _runs(args: argparse.Namespace) -> None:
    show(cli_eval.run_report(args))


def show(outcome: Any) -> None:
    """Print what a command leaves for the terminal; of several processes the first one does."""
    if os.environ.get("RANK", "0") != "0":
        return
    from rich.console import Console

    console = Console()
    for part in outcome.shown:
        if isinstance(part, str):
            print(part)
        else:
            console.print(part)


def _bench(args: argparse.Namespace) -> None:
    from trenchcoat import bench

    settings = {name: getattr(args, name) for name in ("threads", "quick", "repeats", "device")}
    if args.what == "kernels":
        settings |= {"layers": args.layers, "only": [] if args.only is None else args.only.split(",")}
    elif args.only is not None or args.layers is not None:
        raise UsageError(f"--only and --layers are for bench kernels; bench {args.what} does not have them")
    print(bench.run(args.what, out=args.out, say=lambda line: print(line, file=sys.stderr, flush=True), **settings))


def _export(args: argparse.Namespace) -> None:
    from trenchcoat.linearize import stages

    if args.to is not None:
        show(cli_interop.export_lolcats(args))
        return
    show(stages.export(Path(args.target), Path(args.out), merge=args.merge))


if __name__ == "__main__":
    sys.exit(main())
