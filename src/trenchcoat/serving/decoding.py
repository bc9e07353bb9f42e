"""How the next token of an answer is chosen, and how tokens become text: in pieces, without the stop strings.

V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trenchcoat.serving.requests import Request

LOWEST = -9999.0
"""Stands for the logarithm of 0, which JSON cannot say."""

_INCOMPLETE_TOKENS = 16
"""Tokens after which text is passed on even if it ends within a character."""


class Chooser:
    """Chooses the tokens of one answer: greedily, or by sampling if the request or the model's own settings say so.

    Settings that the request leaves out are those of the model's generation config.
    """

    def __init__(self, request: Request, own: Any, prompt: list[int], *, device: torch.device, sample: int = 0) -> None:
        asked = request.temperature is not None or _limits(request)
        temperature = _first(request.temperature, own.temperature if own.do_sample else None, 1.0)
        self.sampled = (asked or bool(own.do_sample)) and temperature > 0
        self.request, self.written = request, dict[int, int]()
        self.history = list(prompt)
        repetition = _first(request.repetition_penalty, own.repetition_penalty, 1.0)
        self.repetition = None if repetition == 1 else RepetitionPenaltyLogitsProcessor(repetition)
        self.warpers = LogitsProcessorList()
        if self.sampled:
            self._add_warpers(own, temperature)
            self.random = torch.Generator(device=device)
            if request.seed is None:
                self.random.seed()
            else:
                self.random.manual_seed((request.seed + sample) % 2**63)

    def _add_warpers(self, own: Any, temperature: float) -> None:
        asked, inherited = self.request, own.do_sample
        top_k = _first(asked.top_k, own.top_k if inherited else None, 0)
        top_p = _first(asked.top_p, own.top_p if inherited else None, 1.0)
        min_p = _first(asked.min_p, own.min_p if inherited else None, 0.0)
        if temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(temperature))
        if top_k > 0:
            self.warpers.append(TopKLogitsWarper(min(top_k, 2**31)))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))
        if min_p > 0:
            self.warpers.append(MinPLogitsWarper(min_p))

    def choose(self, logits_V: Tensor) -> int:
        """The next token, given the model's logits."""
        scores = self._adjusted(logits_V)[None]
        if self.sampled:
            shares = torch.softmax(self.warpers(None, scores), -1)
            token = int(torch.multinomial(shares, 1, generator=self.random))
        else:
            token = int(scores.argmax())
        self.history.append(token)
        self.written[token] = self.written.get(token, 0) + 1
        return token

    def _adjusted(self, logits_V: Tensor) -> Tensor:
        """The logits with the penalties and the bias: the presence and frequency penalties count written tokens."""
        scores = logits_V.clone()
        if self.repetition is not None:
            seen = torch.tensor([self.history], device=scores.device)
            scores = self.repetition(seen, scores[None])[0]
        presence, frequency = self.request.presence_penalty, self.request.frequency_penalty
        if (presence or frequency) and self.written:
            tokens = torch.tensor(list(self.written), device=scores.device)
            counts = torch.tensor(list(self.written.values()), device=scores.device, dtype=scores.dtype)
            scores[tokens] -= presence + frequency * counts
        if self.request.logit_bias:
            tokens = torch.tensor(list(self.request.logit_bias), device=scores.device)
            scores[tokens] += torch.tensor(
                list(self.request.logit_bias.values()), device=scores.device, dtype=scores.dtype
            )
        return scores


def _limits(request: Request) -> bool:
    """Whether the request asks for sampling from some of the tokens."""
    return (request.top_p or 1) < 1 or (request.top_k or 0) > 0 or (request.min_p or 0) > 0


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)


@dataclass(frozen=True)
class TokenInfo:
    """A token of an answer (or of an echoed prompt) with its probability under the model."""

    text: str
    offset: int
    """Where its text begins in the text of the choice."""
    logprob: float | None
    """None for the first token of a prompt."""
    top: tuple[tuple[str, float], ...] = ()
    """The texts of the most likely tokens at its place."""


def probabilities(logits_V: Tensor, token: int, alternatives: int) -> tuple[float, dict[int, float]]:
    """(logarithm of the token's probability, the same of the most likely tokens), before sampling settings."""
    logprobs_V = torch.log_softmax(logits_V.float(), -1)
    best = torch.topk(logprobs_V, min(alternatives, logprobs_V.shape[0]))
    top = {int(place): _finite(float(value)) for value, place in zip(best.values, best.indices, strict=True)}
    return _finite(float(logprobs_V[token])), top


def _finite(value: float) -> float:
    return value if math.isfinite(value) else LOWEST


class Detokenizer:
    """Text of tokens that arrive one by one: only whole characters, in constant time a token."""

    def __init__(self, tokenizer: Any, *, special: bool) -> None:
        self.tokenizer, self.skip = tokenizer, not special
        self.tokens: list[int] = []
        self.context, self.done = 0, 0

    def push(self, token: int) -> str:
        """The text that is complete with this token."""
        self.tokens.append(token)
        text = self._pending()
        if text.endswith("\ufffd") and len(self.tokens) - self.done < _INCOMPLETE_TOKENS:
            return ""
        if text:
            self.context, self.done = self.done, len(self.tokens)
        return text

    def flush(self) -> str:
        """The rest, even if it ends within a character."""
        text = self._pending()
        self.done = len(self.tokens)
        return text

    def _pending(self) -> str:
        before = self._decode(self.tokens[self.context : self.done])
        return self._decode(self.tokens[self.context :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=self.skip))


class StopFilter:
    """Passes text on up to the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops, self.held, self.stopped = stops, "", False

    def push(self, text: str) -> str:
        """The text that no stop string can begin in; after one was found, nothing."""
        if self.stopped:
            return ""
        whole = self.held + text
        found = [place for place in (whole.find(stop) for stop in self.stops) if place >= 0]
        if found:
            self.stopped, self.held = True, ""
            return whole[: min(found)]
        keep = max((self._beginning(whole, stop) for stop in self.stops), default=0)
        self.held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]

    def flush(self) -> str:
        """What was held back."""
        text, self.held = self.held, ""
        return text

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        """Characters at the end of `text` that `stop` begins with."""
        longest = min(len(stop) - 1, len(text))
        return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
