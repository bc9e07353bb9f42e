"""Text as a tokenizer takes it, and tokens as a model takes them.

Half a surrogate pair (a JSON escape such as ``\\ud83d`` alone, a byte of the command line that is no UTF-8) is no
character: tokenizers refuse it, so U+FFFD stands in its place. A token that was added to the tokenizer alone has no
embedding: it is named before it reaches the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from trenchcoat.config.errors import refusals

_HALVES = re.compile("[\ud800-\udfff]")


_KINDS = (TypeError, ValueError, OverflowError)
"""What tokenizers raise for a text, beside ``Exception`` itself for a character without a token."""


def clean_text(text: str) -> str:
    """``text`` with U+FFFD for each half of a surrogate pair; as many characters as before."""
    return text if text.isascii() else _HALVES.sub("\ufffd", text)


def tokenize(tokenizer: Any, text: str | list[str], **options: Any) -> Any:
    """What ``tokenizer`` returns for a text, or texts, that are cleaned first; ``UserError`` for what it refuses."""
    cleaned = clean_text(text) if isinstance(text, str) else [clean_text(one) for one in text]
    with refusals(lambda error: f"the tokenizer refuses the text: {' '.join(str(error).split())}", _KINDS):
        return tokenizer(cleaned, **options)


def embeddings_of(model: Any) -> int:
    """Number of tokens that a model has embeddings for."""
    return int(model.get_input_embeddings().weight.shape[0])


def remember_embeddings(tokenizer: Any, count: int) -> None:
    """Record in a model's tokenizer the number of tokens that the model has embeddings for."""
    tokenizer.trenchcoat_embeddings = count


def known_embeddings(tokenizer: Any) -> int | None:
    """What :func:`remember_embeddings` recorded, where the tokenizer has more tokens than that; else None."""
    count = getattr(tokenizer, "trenchcoat_embeddings", None)
    return count if count is not None and len(tokenizer) > count else None


def without_embedding(tokenizer: Any, ids: Sequence[int], count: int | None) -> str | None:
    """A sentence about the first of ``ids`` that has none of the model's ``count`` embeddings; None if all have one."""
    found = None if count is None else next((token for token in ids if token >= count), None)
    if found is None:
        return None
    return (
        f"token {tokenizer.convert_ids_to_tokens(int(found))!r} has id {found}, but the model has embeddings for "
        f"{count} tokens: it was added to the tokenizer alone (save the model after "
        "model.resize_token_embeddings(len(tokenizer)), or leave that token out of the text)"
    )
