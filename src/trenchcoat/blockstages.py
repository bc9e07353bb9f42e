"""What each of the `trenchcoat blocks` commands does; see :mod:`trenchcoat.blocks` for how."""

from __future__ import annotations

