"""`trenchcoat lm-eval`: the evaluation harness's own command line."""

from __future__ import annotations

import argparse
import importlib.util
import sys

from trenchcoat.cli.command import Command
from trenchcoat.config import UserError


def _run(args: argparse.Namespace) -> None:
    """The evaluation harness's own command line, with our models.

    The evaluation harness's own command line (lm_eval), which then knows `--model trenchcoat --model_args path=DIR`.
    All arguments are the harness's; for several GPUs: accelerate launch -m trenchcoat.evaluation.harness, same
    arguments.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval needs the evaluation harness: pip install lm-eval")
    from trenchcoat.evaluation import harness

    before, sys.argv = sys.argv, ["lm_eval", *args.rest]
    try:
        harness.harness_command()
    finally:
        sys.argv = before


COMMAND = Command(_run, raw=True)
