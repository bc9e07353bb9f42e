"""The processes of a run: joining those that torchrun started, collectives on host tensors, and failure reports.

    with joined(recipe.parallel, recipe.model.device):     # a no-op without torchrun or with one process
        ...
        if is_main(): ...

The rest of the package gets the number of processes from here; with one, every function here is the identity. Numbers
are exchanged as float64 over gloo, gradients and weights in :mod:`trenchcoat.runtime.sharding`. A failing process
writes its error to torchrun's store, and every process writes a heartbeat there once a second, so that the others can
tell which one is gone.
"""

from __future__ import annotations

import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trenchcoat.config import ParallelConfig, UserError

_T = TypeVar("_T")

BEAT_SECONDS = 1.0
"""Time between two heartbeats."""
SILENT_SECONDS = 4.0
"""After a failed collective, a process without a heartbeat for this long is reported as gone."""


class ProcessLost(UserError):
    """Another process of the job failed or disappeared; the message names it."""


class FailedElsewhere(UserError):
    """Work done only on the main process failed there; every process raises this with the same message."""

    reported = True


@dataclass(frozen=True)
class World:
    """This process's place in the job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device_type: str = "cpu"


_world = World()
_store: dist.Store | None = None


def world() -> World:
    """This process's place in the job; ``World()`` outside :func:`joined`."""
    return _world


def rank() -> int:
    """Rank of this process."""
    return _world.rank


def size() -> int:
    """Number of processes."""
    return _world.size


def is_main() -> bool:
    """Whether this process is the one that writes files and prints to the user."""
    return _world.rank == 0


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if _world.device_type == "cuda" else torch.device("cpu")


@contextmanager
def joined(cfg: ParallelConfig, device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun started, while the block runs; ``device`` is the recipe's model.device.

    Raises ``UserError`` for a backend that cannot run here, and ``ProcessLost``, naming the process that is gone, when
    a collective fails because of it. Does nothing inside another ``joined`` block.
    """
    global _world, _store
    if _store is not None or int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield _world
        return
    found = _from_environment(device)
    store = _join(cfg, found)
    _world, _store = found, store
    heartbeat = _Heartbeat(store, found)
    try:
        yield found
    except (RuntimeError, ValueError, ArithmeticError, OSError, LookupError, TypeError) as error:
        lost = heartbeat.explain(error)
        if lost is not None:
            raise ProcessLost(lost) from error
        raise
    finally:
        heartbeat.stop()
        _world, _store = World(), None
        _leave()


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block this process acts as the only one: it writes its own files and takes part in no collective."""
    global _world
    before = _world
    _world = replace(before, rank=0, size=1)
    try:
        yield
    finally:
        _world = before


def _from_environment(device: str) -> World:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is set but {missing[0]} is not: start the processes with torchrun")
    rank_, size_, local, local_size = (int(os.environ[name]) for name in names)
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        count = torch.cuda.device_count()
        if local >= count:
            raise UserError(
                f"process {rank_} is number {local} on its node, which has {count} GPU(s): start torchrun with "
                f"--nproc_per_node {max(count, 1)}, or set model.device=cpu"
            )
        torch.cuda.set_device(local)
    return World(rank_, size_, local, local_size, "cuda" if on_gpu else "cpu")


def _join(cfg: ParallelConfig, found: World) -> dist.Store:
    backend = cfg.backend
    if backend == "nccl" and found.device_type != "cuda":
        raise UserError("parallel.backend=nccl needs GPUs; use parallel.backend=gloo (or auto) on CPUs")
    chosen = "cpu:gloo,cuda:nccl" if found.device_type == "cuda" and backend != "gloo" else "gloo"
    timeout = timedelta(seconds=cfg.timeout_seconds)
    try:
        store, _, _ = next(dist.rendezvous("env://", found.rank, found.size, timeout=timeout))
        store.set_timeout(timeout)
        # torchrun keeps one store across its restarts
        store = dist.PrefixStore(f"trenchcoat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(
            chosen, store=dist.PrefixStore("group", store), rank=found.rank, world_size=found.size, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"process {found.rank} could not join the others: {' '.join(str(error).split())}") from error
    return store


def _leave() -> None:
    with suppress(RuntimeError):  # destroying a broken group may fail
        dist.destroy_process_group()


class _Heartbeat:
    """Sends this process's heartbeat and checks those of the others."""

    def __init__(self, store: dist.Store, found: World) -> None:
        self.store, self.world = store, found
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="trenchcoat-heartbeat")
        store.set(f"host/{found.rank}", platform.node())
        self._thread.start()

    def _beat(self) -> None:
        count = 0
        while not self._ended.is_set():
            count += 1
            try:
                self.store.set(f"beat/{self.world.rank}", str(count))
            except RuntimeError:
                return  # the store is gone, and torchrun with it
            self._ended.wait(BEAT_SECONDS)

    def stop(self) -> None:
        """End the heartbeat."""
        self._ended.set()
        self._thread.join(timeout=2 * BEAT_SECONDS)

    def explain(self, error: BaseException) -> str | None:
        """A sentence naming the process that failed, if ``error`` may come from a broken collective; None for our own
        error."""
        if isinstance(error, FailedElsewhere):
            return None
        own = isinstance(error, UserError | ArithmeticError) or not isinstance(error, RuntimeError)
        try:
            if own:
                self.store.set(f"failed/{self.world.rank}", f"{type(error).__name__}: {error}"[:2000])
                return None
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the survivors: report why first
            found = self._blame(error)
            if found is not None:
                self.store.set(f"left/{self.world.rank}", "because of another")
            return found
        except RuntimeError:
            return f"process {self.world.rank} lost contact with the job ({_first_line(error)})"

    def _blame(self, error: BaseException) -> str | None:
        others = [r for r in range(self.world.size) if r != self.world.rank]
        before = {r: self._read(f"beat/{r}") for r in others}
        deadline = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < deadline:
            failed = {r: text for r in others if (text := self._read(f"failed/{r}"))}
            if failed:
                where, text = next(iter(failed.items()))
                return f"process {where} of {self.world.size} failed ({text}), so process {self.world.rank} stops too"
            time.sleep(0.2)
        silent = [r for r in others if self._read(f"beat/{r}") == before[r]]
        if not silent:
            return None
        silent = [r for r in silent if not self._read(f"left/{r}")] or silent
        names = ", ".join(f"{r} (on {self._read(f'host/{r}') or 'an unknown node'})" for r in silent)
        return (
            f"process {names} of {self.world.size} is gone, so process {self.world.rank} stops too "
            f"({_first_line(error)}). Run the same command again, or start torchrun with --max-restarts, to continue "
            "from the newest checkpoint"
        )

    def _read(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# Collectives on host tensors


def barrier() -> None:
    """Wait for every process."""
    if size() > 1:
        all_sum([0.0])


def all_sum(values: Sequence[float]) -> list[float]:
    """Sums over processes, in float64; NaN and infinity are preserved."""
    if size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


def sum_metrics(numbers: Mapping[str, float]) -> dict[str, float]:
    """Sum of each number over processes; the names are the same on all."""
    return dict(zip(numbers, all_sum(list(numbers.values())), strict=True))


def sum_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a host tensor over processes, in place."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(value: float) -> float:
    """The largest of the processes' values."""
    if size() == 1:
        return value
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def share(items: Sequence[_T]) -> list[_T | None]:
    """This process's ``items[rank::size]``, padded with None so that all processes get lists of the same length."""
    rounds = -(-len(items) // size())
    places = [number * size() + rank() for number in range(rounds)]
    return [items[place] if place < len(items) else None for place in places]


def from_main(work: Callable[[], _T]) -> _T:
    """Run ``work`` on the main process; every process returns its result (so it must be plain data) or raises its
    error."""
    if size() == 1:
        return work()
    box: list[Any] = [None, None]
    failure: Exception | None = None
    if is_main():
        try:
            box[0] = work()
        except (UserError, OSError, ValueError, RuntimeError) as error:
            failure, box[1] = error, f"{error}"
    dist.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise FailedElsewhere(box[1])
    result: _T = box[0]
    return result


def first_of(text: str | None) -> str | None:
    """The text of the first process that has one."""
    if size() == 1:
        return text
    found: list[str | None] = [None] * size()
    dist.all_gather_object(found, text)
    return next((one for one in found if one), None)


def in_turns_per_node(work: Callable[[], _T]) -> _T:
    """Run ``work`` on the first process of each node before the others, which find what it downloaded or cached."""
    if size() == 1:
        return work()
    if world().local_rank == 0:
        try:
            return work()
        finally:
            barrier()
    barrier()
    return work()


def one_by_one_per_node(work: Callable[[], _T]) -> _T:
    """Run ``work`` on the processes of a node one by one, so that only one holds its temporary memory at a time."""
    for turn in range(round(largest(float(world().local_size)))):
        if turn == world().local_rank:
            result = work()
        barrier()
    return result


def leave_note(name: str, text: str) -> None:
    """Store a note that the other processes find with :func:`look_for_notes`."""
    assert _store is not None, "notes need a process group: use them inside joined()"
    _store.set(f"note/{name}", text)


def look_for_notes(*names: str) -> list[str] | None:
    """The texts of these notes if all of them exist, else None; does not wait."""
    assert _store is not None, "notes need a process group: use them inside joined()"
    keys = [f"note/{name}" for name in names]
    return [_store.get(key).decode() for key in keys] if _store.check(keys) else None


def mesh(cfg: ParallelConfig) -> DeviceMesh:
    """The device mesh for FSDP: 1-D, or nodes x processes per node (``parallel.shard: node``)."""
    if cfg.shard != "node":
        return flat_mesh()
    per_node = cfg.node_size or world().local_size
    if size() % per_node:
        raise UserError(f"parallel.node_size={per_node} does not divide the {size()} processes of this job")
    return init_device_mesh(world().device_type, (size() // per_node, per_node), mesh_dim_names=("replicate", "shard"))


def flat_mesh() -> DeviceMesh:
    """A 1-D device mesh of all processes."""
    return init_device_mesh(world().device_type, (size(),))


def side_group() -> Any:
    """A separate process group for background work."""
    return dist.new_group(backend="gloo")
