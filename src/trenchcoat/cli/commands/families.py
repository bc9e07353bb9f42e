"""`trenchcoat families`: which model families can be linearized, and which are refused."""

from __future__ import annotations

import argparse
from typing import Any

from trenchcoat.cli.command import Command


def _run(args: argparse.Namespace) -> Any:
    """The model families that can be linearized, and the refused ones.

    List the model families (a config's model_type) that can be linearized, with what each was tried on, and those that
    are refused, with the reason. Any other family is examined when its model is loaded: it works if its attention goes
    through Transformers' attention interface, and is refused with the reason if it does not.
    """
    from rich.table import Table

    from trenchcoat.models.families import KNOWN_FAMILIES, REASONS, tried_how

    works, refused = Table("family", "tried how"), Table("refused", "why")
    for family in KNOWN_FAMILIES:
        works.add_row(family, tried_how(family))
    for reason in dict.fromkeys(REASONS.values()):
        refused.add_row(", ".join(family for family, why in REASONS.items() if why == reason), reason)
    return works, refused, "other families are examined when their model is loaded"


COMMAND = Command(_run, examples=("families",), libraries=False)
