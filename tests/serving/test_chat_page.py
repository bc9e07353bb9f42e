"""The chat page at `/`, in a real browser without a window where there is one, and by its text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import trenchcoat.serving
from browser_kit import BINARY, Browser, browser
from serve_kit import LONG, Running, ask, metric, running, wait_until

pytest_plugins = ["serve_fixtures"]

needs_browser = pytest.mark.skipif(BINARY is None, reason="no chromium here: apt-get install chromium")
ANSWER = "document.querySelector('.assistant:last-of-type')?.textContent"
FIGURES = "document.querySelector('#figures').textContent"


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def talkative(adapter: Path, template: Path) -> Iterator[Running]:
    """A chat server whose answers take minutes, unless they are stopped."""
    with running(adapter, "--context", 2 * LONG, "--chat-template", template, "--api-key", "open") as found:
        yield found


def opened(window: Browser, server: Running) -> None:
    window.events.clear()
    window.call("Page.navigate", url=f"http://127.0.0.1:{server.port}/")
    window.wait("document.readyState === 'complete' && typeof ask === 'function'")


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.elements.append((tag, dict(attributes)))


def test_the_page_is_one_file_and_needs_nothing_from_the_network() -> None:
    text = Path(trenchcoat.serving.__file__).with_name("chat.html").read_text()
    page = _Page()
    page.feed(text)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(tags)
    assert not any({"src", "href", "srcset", "action"} & attributes.keys() for _, attributes in page.elements)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not re.search(
        r"https?:|//[a-z]|url\(|@import|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text
    )
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {"question", "send", "stop", "figures", "key", "clear"} <= ids
    assert set(re.findall(r'find\("(\w+)"\)', text)) <= ids, "the script uses elements that the page does not have"


def test_the_page_may_run_its_own_script_only(server: Running) -> None:
    answer = ask(server, "/")
    policy = answer.headers["content-security-policy"]
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'; script-src 'sha256-" in policy
    assert "'unsafe-eval'" not in policy
    assert "frame-ancestors 'none'" in policy


@needs_browser
def test_a_conversation(window: Browser, server: Running) -> None:
    opened(window, server)
    assert window.wait("document.querySelector('#model').textContent === 'coat'")
    window.type("#question", "What is in the pockets? <b>&amp;</b>", key="Enter")
    window.wait(f"/state/.test({FIGURES})")
    question = window.evaluate("document.querySelector('.user').textContent")
    assert question == "What is in the pockets? <b>&amp;</b>", "shown as it was typed"
    prompt = f"user: {question}\nassistant:"
    whole = server.client.completions.create(model="coat", prompt=prompt, max_tokens=1024).choices[0].text
    assert window.evaluate(ANSWER) == whole
    figures = re.fullmatch(r"(\d+) tokens, [\d.]+ tokens/s, state ([\d.]+) KiB", window.evaluate(FIGURES))
    assert figures is not None, window.evaluate(FIGURES)
    assert int(figures[1]) == len(whole)
    assert float(figures[2]) == pytest.approx(metric(server, "trenchcoat_state_bytes") / 1024, abs=0.1)
    window.click("#clear")
    assert window.evaluate("[document.querySelectorAll('.turn').length, turns.length]") == [0, 0]
    assert window.complaints() == []
    assert set(window.addresses()) <= {
        f"http://127.0.0.1:{server.port}/{path}" for path in ("", "v1/models", "v1/chat/completions", "favicon.ico")
    }


@needs_browser
def test_stop_ends_the_answer_and_the_work(window: Browser, talkative: Running) -> None:
    opened(window, talkative)
    window.wait(f"/API key/.test({FIGURES})")
    window.type("#key", "open", key="Enter")
    window.evaluate("document.querySelector('#key').dispatchEvent(new Event('change'))")
    window.wait("document.querySelector('#model').textContent === 'coat'")
    longer = "([path, body]) => [path, {...body, max_tokens: 100000}]"
    window.evaluate(f"request = ((old) => () => ({longer})(old()))(request)")
    window.type("#question", "Go on")
    window.click("#send")
    window.wait(f"{ANSWER}?.length > 20")
    assert window.evaluate("[document.querySelector('#send').disabled, document.querySelector('#stop').disabled]") == [
        True,
        False,
    ]
    window.click("#stop")
    window.wait(f"{FIGURES} === 'stopped'", 10)
    wait_until(lambda: 'status="499"} 1' in ask(talkative, "/metrics", Authorization="Bearer open").body.decode(), 20)
    text = window.evaluate(ANSWER)
    assert len(text) > 20, "what was written stays"
    assert window.evaluate("turns.map((turn) => turn.role).join()") == "user,assistant"
    assert window.evaluate("document.querySelector('#send').disabled") is False


@needs_browser
def test_a_model_without_a_template_is_spoken_to_in_a_transcript(window: Browser, endless: Running) -> None:
    opened(window, endless)
    window.wait("document.querySelector('#model').textContent === 'coat'")
    window.evaluate(
        "turns = [{role: 'user', content: 'a'}, {role: 'assistant', content: 'b'}, {role: 'user', content: 'c'}]"
    )
    path, body = window.evaluate("request()")
    assert (path, body["prompt"]) == ("/v1/completions", "User: a\nAssistant: b\nUser: c\nAssistant:")
    window.evaluate("turns = []")
    window.type("#question", "hi", key="Enter")
    window.wait(f"/state/.test({FIGURES})")
    assert len(window.evaluate(ANSWER)) == 1024


@needs_browser
def test_errors_are_shown(window: Browser, server: Running) -> None:
    opened(window, server)
    window.wait("document.querySelector('#model').textContent === 'coat'")
    window.type("#question", "x" * 500, key="Enter")
    window.wait("/this server takes fewer than 400/.test(document.querySelector('.error')?.textContent)")
    assert window.evaluate("turns.length") == 0, "the question that failed is not sent again"
