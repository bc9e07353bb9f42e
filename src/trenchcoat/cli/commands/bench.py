"""`trenchcoat bench`: measurements on this machine."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from trenchcoat.cli.command import Command, values
from trenchcoat.config import UsageError


def _options(parser: argparse.ArgumentParser) -> None:
    known = ["ops", "transfer", "blocks", "clip", "decode", "kernels", "tiles"]
    add = parser.add_argument
    add("what", choices=known, help="what to measure")
    add("--out", metavar="FILE", help="also write the result as JSON")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add("--device", default="cpu", help="cpu or cuda (cpu)")
    add("--repeats", type=int, metavar="N", help="measurements each, their median counts")
    add("--quick", action="store_true", help="small sizes: a check that it runs, not a measurement")
    add("--only", metavar="PARTS", help="kernels: some of operator,model,decode (all)")
    add("--layers", type=int, metavar="N", help="kernels: depth of the models (4 for prefill, else 32)")


def _run(args: argparse.Namespace) -> Any:
    """Measure the operator, a transfer step or decoding here.

    Measure on this machine. ops: the attention operator against the quadratic reference and PyTorch's own attention.
    transfer: time and memory of an attention-transfer step against the bare teacher forward and the naive way. blocks:
    memory and throughput of block-wise transfer against the joint run. clip: one gradient clip for all layers against
    one for each, where the layers' scales differ 1000-fold. decode: time a token and state against the softmax teacher
    with its KV cache, by context; batches; bfloat16 states; a long prompt. kernels: the Triton kernels on a GPU
    (--device cuda), against the device's own ceilings, other attentions, and an 8B-shaped model with softmax attention;
    --out is written as the measurements come in. tiles: find the kernels' fastest launch settings on this GPU and keep
    them by its name.
    """
    from trenchcoat import bench

    settings = values(args, "out", "threads", "quick", "repeats", "device")
    if args.what == "kernels":
        settings |= {"layers": args.layers, "only": [] if args.only is None else args.only.split(",")}
    elif args.only is not None or args.layers is not None:
        raise UsageError(f"--only and --layers are for bench kernels; bench {args.what} does not have them")
    return (bench.run(args.what, say=lambda line: print(line, file=sys.stderr, flush=True), **settings),)


COMMAND = Command(_run, _options)
