"""`trenchcoat bench`: measurements on this machine."""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

from trenchcoat.bench.registry import BENCHMARKS, run_benchmark
from trenchcoat.cli.command import Command, values, whole_number


def _lengths(text: str) -> tuple[int, ...]:
    """A type for ``add_argument``: whole numbers above 0, separated by commas."""
    return tuple(map(whole_number(1), text.split(",")))


def _options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "benchmarks:\n" + "\n".join(f"  {name:<9} {what}" for name, (_, what) in BENCHMARKS.items())
    add = parser.add_argument
    add("what", metavar="NAME", choices=BENCHMARKS, help="what to measure; see below")
    add("--out", metavar="FILE", help="also write the result as JSON")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add("--device", default="cpu", help="cpu or cuda (cpu)")
    add("--repeats", type=int, metavar="N", help="number of measurements; their median is reported")
    add("--quick", action="store_true", help="small sizes: a check that it runs, not a measurement")
    add(
        "--only",
        metavar="PARTS",
        help="kernels: some of operator,layer,model,decode; decode: of contexts,batch,drift,prompts (all)",
    )
    add("--model", metavar="DIR", help="serve: a run, adapter or complete folder (the embedded teacher, untrained)")
    add("--teacher", metavar="DIR", help="serve with vLLM: the folder of the softmax model")
    add("--engine", metavar="NAME", help="serve: embedded or vllm (embedded)")
    add("--url", metavar="A[,B]", help="serve: running servers instead, of the student and of the teacher")
    add(
        "--contexts",
        type=_lengths,
        default=(),
        metavar="N[,N]",
        help="serve: tokens of the prompts (256,1024,4096,16384)",
    )
    add("--clients", type=whole_number(1), metavar="N", help="serve: requests at once (4)")
    add("--tokens", type=whole_number(1), metavar="N", help="serve: tokens of an answer (64)")
    add("--dtype", metavar="NAME", help="serve: of the model, such as float32 (the folder's)")
    add("--vllm-option", metavar="OPTION", action="append", default=[], help="serve with vLLM: an option of its own")
    add("--layers", type=int, metavar="N", help="kernels: depth of the models (4 for prefill, else 32)")


def _run(args: argparse.Namespace) -> Any:
    """Measure the operator, a transfer step or decoding here.

    Measure on this machine: print a table, and with --out write all figures as JSON (for kernels, after each
    measurement; for serve, with a picture beside it).
    """
    names = (
        "out",
        "threads",
        "quick",
        "repeats",
        "device",
        "layers",
        "model",
        "teacher",
        "engine",
        "url",
        "contexts",
        "clients",
        "tokens",
        "dtype",
        "vllm_option",
    )
    settings = values(args, *names)
    only = () if args.only is None else args.only.split(",")
    say = functools.partial(print, file=sys.stderr, flush=True)
    return (run_benchmark(args.what, say=say, only=only, **settings),)


COMMAND = Command(
    _run,
    _options,
    examples=(
        "bench ops --quick",
        "bench serve --model runs/smollm2 --out serve.json",
        "bench kernels --only decode --device cuda --out kernels.json",
    ),
)
