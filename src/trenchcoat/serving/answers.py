"""Answers in OpenAI's forms: whole, or as the chunks of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

from trenchcoat.serving.decoding import TokenInfo
from trenchcoat.serving.engine import Job, Piece
from trenchcoat.serving.requests import Request


class Answer:
    """What is written in answer to one request."""

    def __init__(self, request: Request, ident: str, model: str) -> None:
        self.request, self.model = request, model
        self.ident = f"{'chatcmpl' if request.chat else 'cmpl'}-{ident}"
        self.created = int(time.time())
        self._tools: dict[int, int] = {}

    def _head(self, *, chunk: bool) -> dict[str, Any]:
        kind = f"chat.completion{'.chunk' if chunk else ''}" if self.request.chat else "text_completion"
        return {"id": self.ident, "object": kind, "created": self.created, "model": self.model}

    def first_chunks(self, choices: int) -> list[bytes]:
        """The chunks before any text: of chat, the role of each choice."""
        if not self.request.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
            for index in range(choices)
        ]

    def chunks(self, piece: Piece) -> list[bytes]:
        """A piece of an answer as the chunks of a stream."""
        made = []
        for body in self._bodies(piece) or [{}]:
            choice = {
                "index": piece.choice,
                **({"delta": body} if self.request.chat else {"text": body.get("text", "")}),
            }
            made.append(choice | {"logprobs": None, "finish_reason": None})
        made[0]["logprobs"] = self._logprobs(piece.tokens)
        made[-1]["finish_reason"] = piece.finish
        return [self._chunk([choice]) for choice in made]

    def last_chunks(self, job: Job) -> list[bytes]:
        """The chunks after all text."""
        end = [b"data: [DONE]\n\n"]
        return [self._chunk([], usage(job)), *end] if self.request.include_usage else end

    def _chunk(self, choices: list[dict[str, Any]], used: dict[str, Any] | None = None) -> bytes:
        body = self._head(chunk=True) | {"choices": choices}
        if self.request.include_usage:
            body["usage"] = used
        return event(body)

    def _bodies(self, piece: Piece) -> list[dict[str, Any]]:
        """The deltas (of chat) or texts of a piece."""
        if not self.request.chat:
            return [{"text": "".join(part.text for part in piece.parts)}]
        bodies: list[dict[str, Any]] = []
        for part in piece.parts:
            if part.kind == "tool":
                call = self._tool_call(piece.choice, part.name, part.text)
                bodies.append({"tool_calls": [call]})
            else:
                bodies.append({"reasoning_content" if part.kind == "reasoning" else "content": part.text})
        return bodies

    def _tool_call(self, choice: int, name: str, arguments: str) -> dict[str, Any]:
        index = self._tools[choice] = self._tools.get(choice, -1) + 1
        function = {"name": name, "arguments": arguments}
        return {"index": index, "id": f"call_{self.ident}_{choice}_{index}", "type": "function", "function": function}

    def whole(self, pieces: Iterable[Piece], job: Job) -> bytes:
        """All pieces as one answer, in JSON."""
        by_choice: dict[int, list[Piece]] = {}
        for piece in pieces:
            by_choice.setdefault(piece.choice, []).append(piece)
        choices = [self._choice(index, by_choice[index]) for index in sorted(by_choice)]
        return json.dumps(self._head(chunk=False) | {"choices": choices, "usage": usage(job)}).encode()

    def _choice(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        bodies = [body for piece in pieces for body in self._bodies(piece)]
        logprobs = self._logprobs([info for piece in pieces for info in piece.tokens])
        ended = {"index": index, "logprobs": logprobs, "finish_reason": pieces[-1].finish}
        if not self.request.chat:
            return ended | {"text": "".join(body["text"] for body in bodies)}
        calls = [call for body in bodies for call in body.get("tool_calls", ())]
        content = "".join(body.get("content", "") for body in bodies)
        reasoning = "".join(body.get("reasoning_content", "") for body in bodies)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in calls]
        return ended | {"message": message}

    def _logprobs(self, infos: list[TokenInfo]) -> dict[str, Any] | None:
        if self.request.logprobs is None:
            return None
        if self.request.chat:
            return {"content": [self._entry(info) for info in infos]}
        return {
            "tokens": [info.text for info in infos],
            "token_logprobs": [info.logprob for info in infos],
            "top_logprobs": [self._top(info) for info in infos],
            "text_offset": [info.offset for info in infos],
        }

    @staticmethod
    def _top(info: TokenInfo) -> dict[str, float] | None:
        """The most likely tokens by their text, which may be the same for several: the most likely counts."""
        if info.logprob is None:
            return None
        texts: dict[str, float] = {}
        for text, value in info.top:
            texts.setdefault(text, value)
        texts.setdefault(info.text, info.logprob)
        return texts

    def _entry(self, info: TokenInfo) -> dict[str, Any]:
        top = [self._token(text, value) for text, value in info.top]
        return self._token(info.text, info.logprob) | {"top_logprobs": top}

    @staticmethod
    def _token(text: str, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def usage(job: Job) -> dict[str, Any]:
    """Tokens of a request; `state_bytes`, which is not OpenAI's, is the size of the model's state after it."""
    prompt, written = job.prompt_tokens, job.written
    counted = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
    return counted | {"state_bytes": job.state_bytes}


def event(body: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return f"data: {json.dumps(body)}\n\n".encode()
