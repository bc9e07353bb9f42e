"""How this package is called on an index and installed, in one place."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "trenchcoat-lm"
"""Name of the distribution, as in `pyproject.toml`; `trenchcoat` on the package index is another project."""

INSTALL = "run `pip install .` in a checkout of its repository (`trenchcoat` on the package index is another project)"
"""How to install it, for messages and model cards."""


def installed_version() -> str | None:
    """The version that is installed; None where the package runs from a folder without being installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None
