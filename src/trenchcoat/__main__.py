"""``python -m trenchcoat`` is the command line."""

from __future__ import annotations

import sys

from trenchcoat.cli.app import main

sys.exit(main())
