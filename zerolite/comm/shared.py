"""Ranks of one host: gradients are read where they are, and parameters exist once.

Every rank packs a round into its own slot of a shared segment and raises a flag; the owner of a shard reads the N
slices in place, inside the update, and writes the new parameters where every rank's parameters view them. Nothing is
sent. Flags are counters in the segment, written with release and read with acquire order.

    segment of a lane    | flags: posted, read, for each rank | slot of rank 0 | slot of rank 1 | ...
    segment of a home    | parameters of a bucket             | flags: updated, for each rank    |

Set-up, agreement and norms use the process group.
"""

from __future__ import annotations

import logging
import os
import platform
import select
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zerolite.comm import Comm, Pending
from zerolite.comm.group import PATIENCE, GroupComm
from zerolite.comm.ledger import RankError
from zerolite.comm.segment import PAGE, Segment
from zerolite.kernels import flag_store_, flag_wait, kernels_in_use

log = logging.getLogger("zerolite")

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # dtype of a round, in its flag
_STRIDE = 8  # int64 words between flags: one cache line each
_SLICE = 0.25  # seconds between looks at the other processes


class Flags:
    """One counter for each rank in shared memory."""

    def __init__(self, comm: SharedComm, words: Tensor) -> None:
        self.comm = comm
        self.words = words.view(torch.int64)  # [ranks * _STRIDE]
        self.places = [rank * _STRIDE for rank in range(comm.size)]

    @staticmethod
    def nbytes(ranks: int) -> int:
        return ranks * _STRIDE * 8

    def raise_to(self, value: int) -> None:
        """Sets this rank's counter; everything written before is visible to who sees it."""
        flag_store_(self.words, self.places[self.comm.rank], value)

    def values(self) -> list[int]:
        """Every rank's counter."""
        return [int(self.words[place]) for place in self.places]

    def wait(self, value: int, what: str) -> None:
        """Waits until every rank's counter is at least `value`."""
        if not flag_wait(self.words, self.places, value, 0.0):
            self.comm.wait_for(lambda seconds: flag_wait(self.words, self.places, value, seconds), what)


class Arriving:
    """A result that is there once all ranks have raised a flag."""

    def __init__(self, wait: Callable[[], None], result: Any) -> None:
        self._wait = wait
        self.result = result

    def wait(self) -> Any:
        self._wait()
        return self.result


class SharedLane:
    """One bucket's rounds in shared memory (see lane.Lane)."""

    def __init__(self, comm: SharedComm, numel: int, transient: bool) -> None:
        self.comm = comm
        self.numel = numel
        self.transient = transient  # give the memory back after each round
        self.slot = -(-numel * 4 // PAGE) * PAGE  # fp32 rounds fit; pages that are never written take no memory
        head = -(-2 * Flags.nbytes(comm.size) // PAGE) * PAGE
        self.segment = Segment(head + comm.size * self.slot, comm.rank, comm.share_quietly, private=False)
        memory, half = self.segment.shared, Flags.nbytes(comm.size)
        self.posted = Flags(comm, memory[:half])
        self.read = Flags(comm, memory[half : 2 * half])
        self.start = head
        self.rounds = 0
        self.open = False  # a round was exchanged and not read yet
        self.used: torch.dtype | None = None  # dtype of an earlier round that the slot holds

    def _slots(self, dtype: torch.dtype) -> list[Tensor]:
        size = self.numel * dtype.itemsize
        starts = [self.start + rank * self.slot for rank in range(self.comm.size)]
        return [self.segment.shared[start : start + size].view(dtype) for start in starts]

    def take(self, dtype: torch.dtype) -> Tensor:
        self.read.wait(self.rounds, "exchange (a slot still read)")
        mine = self._slots(dtype)[self.comm.rank]
        if self.used is not None and self.used != dtype:
            mine.zero_()  # padding of one width is values of the other
        self.used = dtype
        return mine

    def exchange(self, full: Tensor, what: str) -> Pending:
        self.comm.ledger.enter(what, 0)
        self.rounds += 1
        self.open = True
        code = _CODES[full.dtype]
        self.posted.raise_to(self.rounds * 4 + code)
        span = slice(self.comm.rank * (self.numel // self.comm.size), (self.comm.rank + 1) * (self.numel // self.comm.size))
        sources = [slot[span] for slot in self._slots(full.dtype)]
        rounds = self.rounds

        def wait() -> None:
            self.posted.wait(rounds * 4, what)
            if any(value != rounds * 4 + code for value in self.posted.values()):
                raise RankError(
                    f"ranks disagree in '{what}': some send {full.dtype}, others do not. Use no_sync() on every rank."
                )

        return Arriving(wait, sources)

    def done(self) -> None:
        if self.open:
            self.open = False
            self.read.raise_to(self.rounds)

    def rest(self) -> None:
        """Gives a transient slot's memory back once every rank has read it."""
        if self.transient and self.used is not None and not self.open:
            self.read.wait(self.rounds, "exchange (a slot still read)")
            begin = self.start + self.comm.rank * self.slot
            self.segment.free(begin, begin + self.slot)
            self.used = None


class Home:
    """One bucket's parameters, once for all ranks of the host.

    `shared` is written by the owners of shards, inside a step; `private` is what nn.Parameters view.
    """

    shared: Tensor  # 1D, numel
    private: Tensor  # 1D, numel

    def __init__(self, comm: SharedComm, numel: int, dtype: torch.dtype) -> None:
        size = numel * dtype.itemsize
        tail = -(-size // PAGE) * PAGE
        self.segment = Segment(tail + Flags.nbytes(comm.size), comm.rank, comm.share_quietly, private=True)
        assert self.segment.private is not None
        self.shared = self.segment.shared[:size].view(dtype)
        self.private = self.segment.private[:size].view(dtype)
        self.updated = Flags(comm, self.segment.shared[tail : tail + Flags.nbytes(comm.size)])
        self.updates = 0

    def publish(self, what: str) -> Pending:
        """This rank has written its shard; the result is there when all have."""
        self.updates += 1
        updates = self.updates
        self.updated.raise_to(updates)
        return Arriving(lambda: self.updated.wait(updates, what), self.shared)

    def dirty(self) -> bool:
        """Whether this process has written to `private` since the last refresh."""
        return self.segment.dirty()

    def refresh(self) -> None:
        """`private` shows what is shared again."""
        self.segment.refresh()


class SharedComm:
    """The Comm of ranks that all run on one host; control data goes over the process group."""

    def __init__(self, group: GroupComm) -> None:
        self.group = group
        self.rank, self.size, self.ledger = group.rank, group.size, group.ledger
        self._watched: list[int] = []
        self._poll = select.poll()
        for rank, pid in enumerate(group.share(os.getpid(), "set-up processes")):
            if rank != self.rank:
                descriptor = os.pidfd_open(pid)
                self._watched.append(descriptor)
                self._poll.register(descriptor, select.POLLIN)

    def __del__(self) -> None:
        for descriptor in self._watched:
            os.close(descriptor)

    def wait_for(self, ready: Callable[[float], bool], what: str) -> None:
        """Waits for a flag, looking after the other processes; raises RankError as a group's collective would."""
        group = self.group
        deadline, compare_at = time.monotonic() + group.timeout, time.monotonic() + PATIENCE
        order, seen, late = sum(self.ledger.calls.values()), [""][:0], False
        try:
            while not ready(min(_SLICE, max(deadline - time.monotonic(), 0.001))):
                if self._poll.poll(0) and not ready(0.0):
                    raise group.lost(what, RuntimeError("its process has ended"))
                if time.monotonic() >= compare_at:
                    late, compare_at = True, time.monotonic() + PATIENCE
                    seen = group.compare(what, order, seen)
                if time.monotonic() >= deadline:
                    raise group.late(what)
        finally:
            if late:
                group.retract()

    def exchange(self, full: Tensor, what: str) -> Pending:
        return self.group.exchange(full, what)

    def gather(self, full: Tensor, shard: Tensor, what: str) -> Pending:
        return self.group.gather(full, shard, what)

    def sum_(self, values: Tensor, what: str) -> None:
        self.group.sum_(values, what)

    def max_(self, values: Tensor, what: str) -> None:
        self.group.max_(values, what)

    def broadcast_(self, values: Tensor, what: str) -> None:
        self.group.broadcast_(values, what)

    def share(self, value: Any, what: str) -> list[Any]:
        return self.group.share(value, what)

    def share_quietly(self, value: Any) -> list[Any]:
        """share, for segments."""
        return self.group.share(value, "set-up segment")

    def lane(self, numel: int, device: torch.device, transient: bool) -> SharedLane:
        return SharedLane(self, numel, transient)

    def home(self, numel: int, dtype: torch.dtype) -> Home:
        return Home(self, numel, dtype)


def share_host(comm: Comm, hosts: list[tuple[str, int]]) -> Comm:
    """Shared memory where all ranks of a process group are processes of one host, else `comm` (a collective).

    hosts  (host, process) of each rank. ZEROLITE_SHARED=0 keeps the process group.
    """
    if not isinstance(comm, GroupComm) or len({host for host, _ in hosts}) > 1 or len(set(hosts)) < 2:
        return comm
    if os.environ.get("ZEROLITE_SHARED", "1") == "0":
        return comm
    problem = ""
    shared: Comm = comm
    try:
        if kernels_in_use() == "reference" and platform.machine() not in ("x86_64", "AMD64"):
            raise OSError("flags need the native kernels on this processor")
        shared = candidate = SharedComm(comm)
        probe = Segment(PAGE, comm.rank, candidate.share_quietly, private=True)
        probe.dirty()
    except (OSError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    found = [text for text in comm.share(problem, "set-up sharing") if text]
    if found:
        if comm.rank == 0:
            log.warning("zerolite: ranks of this host cannot share memory (%s); the process group is used instead", found[0])
        return comm
    return shared
