"""Markdown reports as one self-contained HTML file: images embedded, no scripts, nothing fetched."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt

from trenchcoat.runtime.files import write_text

STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.92rem; display: block; overflow-x: auto; }
th, td { border: 1px solid #d0d0d0; padding: 0.25rem 0.6rem; }
th { background: #f3f3f3; }
pre { background: #f6f6f6; padding: 0.7rem; overflow-x: auto; }
img { max-width: 100%; }
"""
_FOLD = re.compile(r"<p>&lt;details&gt;&lt;summary&gt;([^<]*?)&lt;/summary&gt;</p>")
_PICTURE = re.compile(r'<img src="([^"]*)" alt="([^"]*)"[^>]*>')


def write_page(path: Path, markdown: str, pictures: Path) -> None:
    """Write ``markdown`` as HTML to ``path``; the PNG images of the folder ``pictures`` that it refers to are embedded.

    An image from elsewhere (an address, another folder) is left out: its description stands in its place. Text of
    models and data sets is escaped; the only HTML let through is the report's own ``details``.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = _FOLD.sub(r"<details><summary>\1</summary>", body).replace("<p>&lt;/details&gt;</p>", "</details>")
    body = _PICTURE.sub(lambda found: _embedded(found[1], found[2], pictures), body)
    heading = re.search(r"^# (.+)$", markdown, re.MULTILINE)
    title = html.escape(heading[1].replace("`", "")) if heading else "report"
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>\n{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
    write_text(path, page)


def _embedded(source: str, description: str, pictures: Path) -> str:
    """An image of the folder ``pictures`` itself as HTML that holds its bytes; of any other, the description."""
    place = (pictures / unquote(html.unescape(source))).resolve()
    if place.suffix != ".png" or place.parent != pictures.resolve() or not place.is_file():
        return description
    content = base64.b64encode(place.read_bytes()).decode("ascii")
    return f'<img src="data:image/png;base64,{content}" alt="{description}" />'
