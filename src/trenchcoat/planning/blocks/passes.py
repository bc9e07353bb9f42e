"""How many tokens a pass through the blocks holds, and where their hidden states are stored: arithmetic, no I/O.

Streaming takes a *pass* of training rows through all blocks, one block at a time: it reads the block's weights, trains
its students on the pass's micro-batches and writes the teacher's outputs, which are the next block's inputs. Long
passes read the weights rarely but hold many hidden states; short ones do the opposite. Notation: N tokens that the
stage trains on (all epochs), D of them in distinct rows, V validation tokens, P tokens per pass, n blocks, b bytes of a
token's hidden state, w bytes of all blocks' weights.

    held             2 b (min(P, D) + V)      inputs and outputs of one block; a row is held once for all epochs
    weights read     w ceil(N / P)            once per pass, by every node
    states read      n b (N + V ceil(N / P))  on disk: in every epoch, and the validation rows once per pass
    states written   n b (min(P, D) + V)      on disk: in each pass
    computed         N + V ceil(N / P)        tokens

Reading the next block and reading and writing hidden states overlap with computing, so a block takes the longer of the
two; reading a pass's first block and copying weights from the host to the device do not overlap. Further evaluations of
the validation rows inside a pass are not counted.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trenchcoat.config import UserError
from trenchcoat.config.units import in_words, parse_tokens, tera

Place = Literal["memory", "disk"]

MARGIN = 0.05
"""Hidden states stay in memory unless the disk is faster by more than this fraction: bandwidths are not that exact."""


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """The text that attention transfer processes."""

    tokens: int
    """N: tokens that the stage trains on, in all epochs."""
    distinct: int
    """D: tokens in distinct training rows."""
    validation: int
    """V: tokens in the validation rows of an evaluation; they are part of every pass."""


@dataclass(frozen=True, kw_only=True)
class Streamed(TokenCounts):
    """The work of a streaming run, and the hardware it runs on."""

    step_tokens: int
    """Tokens per optimizer step, over all processes; a pass is a whole number of steps."""
    bytes_a_token: float
    """b: hidden size times bytes per element."""
    weights: float
    """w: bytes of all blocks' weights."""
    blocks: int
    memory: float
    """Bytes of one node's host memory available to hidden states (after prefetched weights)."""
    disk: float
    """Bytes of one node's disk available to hidden states."""
    read: float
    """Disk read bandwidth of one node, for weights and hidden states, in bytes/s."""
    write: float
    """Disk write bandwidth of one node in bytes/s."""
    compute: float | None
    """Seconds per token, all blocks and all processes together; None if unknown."""
    copy: float | None = None
    """Host-to-device bandwidth in bytes/s; None if the host computes."""
    nodes: int = 1
    """Nodes that share the rows; each reads all weights (its processes share the page cache)."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return math.ceil(self.tokens / self.step_tokens)


@dataclass(frozen=True, kw_only=True)
class PassChoice:
    """A pass length and its cost."""

    pass_tokens: int
    """P, a multiple of an optimizer step's tokens; the last pass may be shorter."""
    passes: int
    hidden: Place
    held: float
    """Bytes of hidden states on one node, in memory or on disk."""
    weights_read: float
    """Bytes read by each node."""
    states_read: float
    """Bytes read by all nodes together; 0 in memory."""
    states_written: float
    compute_seconds: float | None
    weights_seconds: float
    states_seconds: float
    seconds: float
    """Total: for each block the longer of compute and disk, plus what does not overlap (reading the first block,
    copying weights to the device). Without ``compute``: everything except compute."""
    why: str

    @property
    def disk_seconds(self) -> float:
        """Seconds for weights and hidden states together."""
        return self.weights_seconds + self.states_seconds


def held_bytes(run: Streamed, steps: int) -> float:
    """Bytes of hidden states on one node in a pass of ``steps`` optimizer steps."""
    rows = min(steps * run.step_tokens, run.tokens, run.distinct) + run.validation
    return 2.0 * run.bytes_a_token * rows / run.nodes


def choose_pass(
    run: Streamed, *, pass_tokens: str = "auto", hidden: Literal["auto", "memory", "disk"] = "auto"
) -> PassChoice:
    """The pass given by `blocks.pass_tokens` and `blocks.hidden`; `auto` means whatever is fastest.

    Raises ``UserError`` if ``pass_tokens`` is not a number or, with the figures, if hidden states do not fit.
    """
    asked = parse_tokens(pass_tokens)
    places: tuple[Place, ...] = ("memory", "disk") if hidden == "auto" else (hidden,)
    least = 1  # optimizer steps of the shortest acceptable pass
    if asked != "auto":
        least = run.steps if asked == "all" else min(run.steps, max(1, asked // run.step_tokens))
    found: dict[Place, PassChoice] = {}
    for place in places:
        steps = _most_steps(run, place) if asked == "auto" else least
        if steps > 0 and held_bytes(run, steps) <= _room(run, place):
            found[place] = _cost(run, steps, place)
    if not found:
        raise UserError(_too_large(run, least, places))
    best: Place = min(found, key=lambda place: found[place].seconds)
    if "memory" in found and found["memory"].seconds <= found[best].seconds * (1 + MARGIN):
        best = "memory"
    other = next((place for place in places if place != best), None)
    why = _why(run, found, best, other, least)
    if other is None and asked != "auto":
        why += " (set by blocks.pass_tokens and blocks.hidden)"
    return dataclasses.replace(found[best], why=why)


def _room(run: Streamed, place: Place) -> float:
    return run.memory if place == "memory" else run.disk


def _most_steps(run: Streamed, place: Place) -> int:
    """Steps of the longest passes that fit, all about equally long; 0 if not even one step fits."""
    room = _room(run, place)
    if held_bytes(run, run.steps) <= room:
        return run.steps
    rows = room * run.nodes / (2.0 * run.bytes_a_token) - run.validation
    most = int(rows // run.step_tokens)
    return 0 if most < 1 else math.ceil(run.steps / math.ceil(run.steps / most))


def _cost(run: Streamed, steps: int, place: Place) -> PassChoice:
    """Sum the costs over the passes, which are equal except for the last."""
    length, passes = steps * run.step_tokens, math.ceil(run.steps / steps)
    count, tokens = np.array([passes - 1, 1]), np.array([length, run.tokens - (passes - 1) * length])

    def total(of_pass: NDArray[np.float64]) -> float:
        """Sum over all passes, from the values for a full pass and for the last one."""
        return float((count * of_pass).sum())

    boundary = run.blocks * run.bytes_a_token if place == "disk" else 0.0
    read = boundary * (tokens + run.validation)
    written = boundary * (np.minimum(tokens, run.distinct) + run.validation)
    compute = (tokens + run.validation) * (run.compute or 0.0)
    states = (read / run.read + written / run.write) / run.nodes
    first = run.weights / run.read / run.blocks
    others = np.maximum(compute / run.blocks, states / run.blocks + first)  # while the next block is read
    last = np.maximum(compute, states) / run.blocks
    copies = 0.0 if run.copy is None else passes * run.weights / run.copy
    return PassChoice(
        pass_tokens=length,
        passes=passes,
        hidden=place,
        held=held_bytes(run, steps),
        weights_read=passes * run.weights,
        states_read=total(read),
        states_written=total(written),
        compute_seconds=None if run.compute is None else total(compute),
        weights_seconds=passes * (run.weights / run.read),
        states_seconds=total(states),
        seconds=total(first + (run.blocks - 1) * others + last) + copies,
        why="",
    )


def _why(run: Streamed, found: dict[Place, PassChoice], best: Place, other: Place | None, least: int) -> str:
    """The choice, its cost, and how the other place compares if there was one."""
    chosen = _described(found[best], run.tokens)
    if other is None:
        return chosen
    if other in found:
        return f"{chosen}; the alternative: {_described(found[other], run.tokens)}"
    return f"{chosen}; {_where(other)} {tera(held_bytes(run, least))} would be needed and {_free(run, other)} is free"


def _described(choice: PassChoice, tokens: int) -> str:
    count = f"{choice.passes} passes" if choice.passes > 1 else "one pass"
    compute = "an unknown time" if choice.compute_seconds is None else _time(choice.compute_seconds)
    parts = [f"weights {_time(choice.weights_seconds)}"]
    if choice.hidden == "disk":
        parts.append(f"hidden states {_time(choice.states_seconds)}")
    total = "" if choice.compute_seconds is None else f", {_time(choice.seconds)} in all"
    states = f"{tera(choice.held)} of hidden states {_where(choice.hidden)}"
    return (
        f"{count} of {min(choice.pass_tokens, tokens):,} tokens, {states}: "
        f"{' and '.join(parts)} of reading and writing alongside {compute} of computing{total}"
    )


def _where(place: Place) -> str:
    return "in memory" if place == "memory" else "on disk"


def _free(run: Streamed, place: Place) -> str:
    return tera(max(0.0, _room(run, place)))


def _time(seconds: float) -> str:
    return in_words(seconds) if seconds >= 5 else f"{seconds:.2g} s"


def _too_large(run: Streamed, steps: int, places: tuple[Place, ...]) -> str:
    rows = min(steps * run.step_tokens, run.tokens, run.distinct)
    fixes = ["lower blocks.pass_tokens"] if steps > 1 else []
    fixes.append("take fewer validation rows (transfer.eval_batches)")
    last = "point blocks.hidden_dir at a larger disk" if "disk" in places else "set blocks.hidden=disk"
    a_node = " of each node" if run.nodes > 1 else ""
    return (
        f"the hidden states of a pass do not fit: {rows:,} training and {run.validation:,} validation tokens take "
        f"{tera(held_bytes(run, steps))} as inputs and outputs of a block; available: "
        f"{' and '.join(f'{_free(run, place)} {_where(place)}' for place in places)}{a_node}. "
        f"To fix it, {', '.join(fixes)} or {last}"
    )
