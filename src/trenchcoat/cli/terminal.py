"""What the command line writes to the terminal, and the exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from trenchcoat.config import UsageError, UserError


def guarded(action: Callable[[], None], *, debug: bool) -> int:
    """Run ``action``; an error becomes one line on standard error (after its traceback with ``debug``) and an exit
    code."""
    try:
        action()
    except KeyboardInterrupt:
        return _failed("stopped; run the same command again to continue", 130, debug)
    except UsageError as error:
        return _failed(str(error), 2, debug)
    except UserError as error:
        return 1 if error.reported and not debug else _failed(str(error), 1, debug)
    except (ValueError, OSError) as error:
        return _failed(f"{error} ({type(error).__name__}; --debug shows where)", 1, debug)
    return 0


def _failed(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    rank = os.environ.get("RANK", "0")
    who = "trenchcoat" if rank == "0" else f"trenchcoat, process {rank}"
    print(f"{who}: {' '.join(message.split())}", file=sys.stderr)
    return code


def warn(message: str) -> None:
    """One line on standard error; written by the main process only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"trenchcoat: {' '.join(message.split())}", file=sys.stderr)


def show(outcome: Any) -> None:
    """Print what a command returns (see ``Command.run``); the main process only."""
    if outcome is None or os.environ.get("RANK", "0") != "0":
        return
    from rich.console import Console

    console = Console()
    for part in getattr(outcome, "shown", outcome):
        if isinstance(part, str):
            print(part)
        else:
            console.print(part)


def quiet_libraries() -> None:
    """Silence the libraries' own notices and progress bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if find_spec("datasets") is not None:  # benchmarks do without
        from datasets import disable_progress_bars

        disable_progress_bars()
