"""Ranks of one host share memory: gradients are read where they are, and parameters exist once for each host.

    lanes    gradient rounds, in region.py
    home     parameters of a bucket     | parameters | flags: updated, for each rank of this host |

What ranks on other hosts have travels over the process group, once a host: a slice of a gradient from its rank to the
owner, and an updated shard from its owner to one rank of each other host, which writes it into that host's home.
Set-up uses the process group; so do agreement and norms where there are several hosts (on one: board.py).
"""

from __future__ import annotations

import logging
import math
import os
import platform
import select
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zerolite.comm import Comm, Pending
from zerolite.comm.board import Board
from zerolite.comm.flags import Arriving, Flags
from zerolite.comm.group import PATIENCE, GroupComm
from zerolite.comm.lane import Lane, LaneSpec
from zerolite.comm.region import shared_lanes
from zerolite.comm.segment import PAGE, Segment, attempt
from zerolite.kernels import kernels_in_use
from zerolite.worker import in_worker

log = logging.getLogger("zerolite")

_SLICE = 0.25  # seconds between looks at the other processes


class Home:
    """One bucket's parameters, once for all ranks of the host.

    `shared` is written by the owners of shards, inside a step or load_pretrained; `private` is what nn.Parameters view.
    """

    shared: Tensor  # 1D, numel
    private: Tensor  # 1D, numel
    place: int  # where `private` begins; torch moves a tensor's memory elsewhere to send it to another process

    def __init__(self, comm: SharedComm, numel: int, dtype: torch.dtype) -> None:
        size = numel * dtype.itemsize
        tail = -(-size // PAGE) * PAGE
        self.comm = comm
        self.segment = Segment(tail + Flags.nbytes(comm.places), comm.place, comm.share_here, private=True)
        assert self.segment.private is not None
        self.shared = self.segment.shared[:size].view(dtype)
        self.private = self.segment.private[:size].view(dtype)
        self.place = self.private.data_ptr()
        self.updated = Flags(comm, self.segment.shared[tail : tail + Flags.nbytes(comm.places)])
        self.updates = 0

    def publish(self, what: str) -> Pending:
        """This rank has written its shard; the result is there when every shard is."""
        self.updates += 1
        updates = self.updates
        far = self.comm.spread(self.shared, what)

        def wait() -> None:
            if far is not None:
                far.wait()
                self.updated.raise_to(updates)
            self.updated.wait(updates, what)

        if far is None:
            self.updated.raise_to(updates)
        return Arriving(wait, self.shared)

    def dirty(self) -> bool:
        """Whether this process has written to `private` since the last refresh."""
        return self.segment.dirty()

    def refresh(self) -> None:
        """`private` shows what is shared again."""
        self.segment.refresh()


class SharedComm:
    """The Comm of ranks of which some share a host.

    hosts  for each rank, which host it is on
    """

    pins = False  # devices copy from and to what is shared (pinned.py)

    def pin(self, memory: Tensor) -> None:
        """Makes shared memory ready for a device's copies."""

    def __init__(self, group: GroupComm, hosts: Sequence[str]) -> None:
        self.group = group
        self.rank, self.size, self.ledger = group.rank, group.size, group.ledger
        self.hosts = [[r for r in range(self.size) if hosts[r] == host] for host in dict.fromkeys(hosts)]
        self.here = next(ranks for ranks in self.hosts if self.rank in ranks)
        self.place, self.places = self.here.index(self.rank), len(self.here)
        self._watched: list[int] = []
        pids = group.share(os.getpid(), "set-up processes")
        self.share_here(attempt(lambda: self._watch([pids[rank] for rank in self.here if rank != self.rank])))
        self.board = Board(self) if len(self.hosts) == 1 else None

    def _watch(self, pids: list[int]) -> None:
        for pid in pids:
            self._watched.append(os.pidfd_open(pid))

    def _ended(self) -> bool:
        """Whether another process has ended. (A poll object serves one thread at a time, and workers wait too.)"""
        poll = select.poll()
        for descriptor in self._watched:
            poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))

    def __del__(self) -> None:
        for descriptor in self._watched:
            os.close(descriptor)

    def wait_for(self, ready: Callable[[float], bool], what: str) -> None:
        """Waits for a flag, looking after the other processes; raises RankError as a group's collective would.

        Ranks compare what their training threads wait for. A worker is ahead of or behind its own training thread, and waits
        for what another rank's worker is about to do.
        """
        group = self.group
        deadline = time.monotonic() + group.timeout
        compare_at = math.inf if in_worker() else time.monotonic() + PATIENCE
        order, late = sum(self.ledger.calls.values()), False
        seen: list[str] = []
        try:
            while not ready(min(_SLICE, max(deadline - time.monotonic(), 0.001))):
                if self._ended() and not ready(0.0):
                    raise group.lost(what, RuntimeError("its process has ended"))
                if time.monotonic() >= compare_at:
                    late, compare_at = True, time.monotonic() + PATIENCE
                    seen = group.compare(what, order, seen)
                if time.monotonic() >= deadline:
                    raise group.late(what)
        finally:
            if late:
                group.retract()

    # ---- between hosts

    def across(self, full: Tensor, near: list[Tensor], what: str) -> tuple[list[Tensor], Pending | None]:
        """The N slices for this rank: `near` of this host's ranks, and of others what the pending exchange brings."""
        if len(self.hosts) == 1:
            self.ledger.enter(what, 0)
            return near, None
        slices = full.view(self.size, -1)
        away = [rank for rank in range(self.size) if rank not in self.here]
        counts = [0 if rank in self.here else slices.size(1) for rank in range(self.size)]
        pending = self.group.trade(slices[away].view(-1), counts, counts, what)
        came = dict(zip(away, pending.result.view(len(away), slices.size(1)), strict=True))
        own = dict(zip(self.here, near, strict=True))
        return [own[rank] if rank in own else came[rank] for rank in range(self.size)], pending

    def _receiver(self, host: list[int], shard: int) -> int:
        """The rank of another host that takes in a shard: as its owner's, its place on its host."""
        own = next(ranks for ranks in self.hosts if shard in ranks)
        return host[own.index(shard) % len(host)]

    def spread(self, home: Tensor, what: str) -> Pending | None:
        """Sends this rank's shard of a home to the other hosts, and brings in theirs; None where there are none."""
        if len(self.hosts) == 1:
            self.ledger.enter(what, 0)
            return None
        shards = home.view(self.size, -1)
        to = [self._receiver(host, self.rank) for host in self.hosts if self.rank not in host]
        away = [rank for rank in range(self.size) if rank not in self.here]
        came_from = [rank for rank in away if self._receiver(self.here, rank) == self.rank]
        width = shards.size(1)
        send = shards[self.rank].repeat(len(to))
        pending = self.group.trade(
            send,
            [width * to.count(rank) for rank in range(self.size)],
            [width * came_from.count(rank) for rank in range(self.size)],
            what,
        )

        def wait() -> None:
            for rank, shard in zip(came_from, pending.wait().view(len(came_from), width), strict=True):
                shards[rank].copy_(shard)

        return Arriving(wait, home)

    # ---- over the process group

    def exchange(self, full: Tensor, what: str) -> Pending:
        return self.group.exchange(full, what)

    def gather(self, full: Tensor, shard: Tensor, what: str) -> Pending:
        return self.group.gather(full, shard, what)

    def broadcast_(self, values: Tensor, what: str) -> None:
        self.group.broadcast_(values, what)

    def share(self, value: Any, what: str) -> list[Any]:
        return self.group.share(value, what)

    def share_here(self, value: Any) -> list[Any]:
        """share, of this host's ranks, for segments (every rank of every host calls it, and an OSError among the values is
        raised on all, so that all go on with the process group)."""
        values = self.group.share(value, "set-up segment")
        for found in values:
            if isinstance(found, OSError):
                raise found
        return [values[rank] for rank in self.here]

    # ---- in shared memory

    def sum_(self, values: Tensor, what: str) -> None:
        if self.board is None or not Board.fits(values):
            return self.group.sum_(values, what)
        self.ledger.enter(what, 0)
        values.copy_(self.board.meet(values, what).sum(0).view(values.shape))

    def max_(self, values: Tensor, what: str) -> None:
        if self.board is None or not Board.fits(values):
            return self.group.max_(values, what)
        self.ledger.enter(what, 0)
        values.copy_(self.board.meet(values, what).amax(0).view(values.shape))

    def lanes(self, specs: Sequence[LaneSpec], device: torch.device) -> list[Lane]:
        near, far = [spec for spec in specs if not spec.scatter], [spec for spec in specs if spec.scatter]
        shared, group = iter(shared_lanes(self, near) if near else []), iter(self.group.lanes(far, device))
        return [next(group if spec.scatter else shared) for spec in specs]

    def beside(self) -> Comm:
        return self.group.beside()

    def home(self, numel: int, dtype: torch.dtype, sharded: bool) -> Home | None:
        return None if sharded and len(self.hosts) > 1 else Home(self, numel, dtype)


def share_host(comm: Comm, hosts: list[tuple[str, int]]) -> Comm:
    """Shared memory where ranks of a process group are processes of one host, else `comm` (a collective).

    hosts  (host, process) of each rank. ZEROLITE_SHARED=0 keeps the process group.
    """
    names = [host for host, _ in hosts]
    if not isinstance(comm, GroupComm) or len(set(hosts)) < len(hosts) or len(set(names)) == len(names):
        return comm  # ranks that are threads of one process, or one rank a host
    if os.environ.get("ZEROLITE_SHARED", "1") == "0":
        return comm

    def make() -> Comm:
        made = SharedComm(comm, names)
        Segment(PAGE, made.place, made.share_here, private=True).check()
        return made

    return if_shared(comm, make)


def if_shared(comm: GroupComm, make: Callable[[], Comm]) -> Comm:
    """What `make` gives, which tries shared memory, or `comm` where that failed on any rank (a collective).

    What may fail on one rank alone is told to all before any goes on, so that all stop at the same place.
    """
    made: Comm = comm
    ordered = platform.machine() in ("x86_64", "AMD64") or kernels_in_use() != "reference"
    problem = "" if ordered else "flags need the native kernels on this processor"
    found = [text for text in comm.share(problem, "set-up sharing") if text]
    if not found:
        try:
            made = make()
        except (OSError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
        found = [text for text in comm.share(problem, "set-up sharing") if text]
    if found and comm.rank == 0:
        log.warning("zerolite: ranks of this host cannot share memory (%s); the process group is used instead", found[0])
    return comm if found else made
