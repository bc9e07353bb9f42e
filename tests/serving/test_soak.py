"""The short form of `scripts/soak_server.py`: mixed requests and disconnects, none lost, memory flat."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import script_module
from serve_kit import Running

pytest_plugins = ["serve_fixtures"]


@pytest.fixture(scope="module")
def script() -> Any:
    return script_module("soak_server")


def test_no_request_is_lost_and_memory_is_flat(server: Running, script: Any) -> None:
    url = f"http://127.0.0.1:{server.port}"
    script.soak(url, minutes=0.05, requests=40, seed=1)  # warming up
    found = script.soak(url, minutes=0.15, requests=80)
    assert (found["lost"], found["idle_at_the_end"]) == ([], True)
    assert found["counted_by_the_server"] == found["requests"] >= 80
    assert found["growth"] < 0.05, found["resident_mib"]
    assert found["passed"] is True
    assert len(found["kinds"]) >= 7


def test_a_lost_request_is_noticed(server: Running, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.Client, "post", lambda *args: (500, b"{}"))
    found = script.soak(f"http://127.0.0.1:{server.port}", minutes=0.01, requests=8)
    assert found["passed"] is False
    assert any("500" in line for line in found["lost"])
    assert found["counted_by_the_server"] < found["requests"]
