"""The servers that several files of tests ask, each a process that is started once: a plugin of pytest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_kit import CONTEXT, LONG, TEMPLATE, Running, running, save_adapter, save_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model; do not modify."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for it; do not modify."""
    return save_adapter(base, tmp_path_factory.mktemp("served") / "coat")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a chat template."""
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def server(adapter: Path, template: Path) -> Iterator[Running]:
    """A server with a chat template and a limit on tokens."""
    with running(adapter, "--context", CONTEXT, "--chat-template", template) as found:
        yield found


@pytest.fixture(scope="session")
def endless(adapter: Path) -> Iterator[Running]:
    """A server without a chat template that would write for minutes."""
    with running(adapter, "--context", 2 * LONG) as found:
        yield found
