"""Devices of one host that no fast link connects: everything passes through host memory that their ranks share.

    gradients   each device copies its rounds into its rank's slot; the owner of a shard averages the N slices on the host
    parameters  the updated halves of all ranks are one tensor, and each device copies all of it up

So each device's bus carries its gradients down and its parameters up once, where a process group would move both through
the host as well and then the rest beside. Small control data passes through shared memory as well (board.py).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zerolite.buffer import Link, Ring
from zerolite.comm import Comm
from zerolite.comm.flags import Flags
from zerolite.comm.group import GroupComm
from zerolite.comm.lane import Lane, LaneSpec
from zerolite.comm.region import SharedLane, shared_lanes
from zerolite.comm.segment import PAGE, Segment
from zerolite.comm.shared import SharedComm, if_shared


class Pool:
    """The compute-dtype parameters of a bucket's owners, once for all ranks of the host, in memory that devices copy from."""

    def __init__(self, comm: PinnedComm, numel: int, dtype: torch.dtype) -> None:
        size = numel * dtype.itemsize
        tail = -(-size // PAGE) * PAGE
        self.segment = Segment(tail + Flags.nbytes(comm.places), comm.place, comm.share_here, private=False)
        comm.pin(self.segment.shared)
        self.shared = self.segment.shared[:size].view(dtype)
        self.updated = Flags(comm, self.segment.shared[tail : tail + Flags.nbytes(comm.places)])
        self.updates = 0

    def publish(self, what: str) -> None:
        """This rank has written its shard; returns when every rank has."""
        self.updates += 1
        self.updated.raise_to(self.updates)
        self.updated.wait(self.updates, what)


class PinnedLane(SharedLane):
    """A bucket's rounds, packed on the device and copied into this rank's slot."""

    def __init__(self, comm: PinnedComm, *args: object, ring: Ring) -> None:
        super().__init__(comm, *args)  # type: ignore[arg-type]
        self.link = comm.link
        self.ring = ring
        self.turn = 0

    def take(self, dtype: torch.dtype, width: int) -> Tensor:
        self.turn, full = self.ring.lend(self.comm.size * width, dtype)
        self.ring.used[self.turn].wait()
        return full

    def fill(self, full: Tensor) -> Callable[[], None]:
        slot = super().take(full.dtype, full.numel() // self.comm.size)
        copied = self.ring.used[self.turn] = self.link.down(slot, full)
        return copied.sync


class PinnedComm(SharedComm):
    """The Comm of ranks of one host, a device each."""

    pins = True

    def __init__(self, group: GroupComm, hosts: Sequence[str], link: Link) -> None:
        self.link = link
        self.check: Callable[[], None] = lambda: None  # raises what went wrong in a worker, whose flags others wait for
        super().__init__(group, hosts)

    def pin(self, memory: Tensor) -> None:
        self.link.register(memory)

    def wait_for(self, ready: Callable[[float], bool], what: str) -> None:
        def look(seconds: float) -> bool:
            self.check()
            return ready(seconds)

        super().wait_for(look, what)

    def lanes(self, specs: Sequence[LaneSpec], device: torch.device) -> list[Lane]:
        ring = Ring(self.link.near)
        return shared_lanes(self, specs, functools.partial(PinnedLane, ring=ring)) if specs else []

    def pool(self, numel: int, dtype: torch.dtype) -> Pool:
        """Memory for one bucket's parameters (a collective)."""
        return Pool(self, numel, dtype)

    def home(self, numel: int, dtype: torch.dtype, sharded: bool) -> None:
        return None


def _together(comm: Comm, hosts: Sequence[tuple[str, int]]) -> bool:
    """Whether ranks are processes of one host."""
    alone = len(hosts) < 2 or len({host for host, _ in hosts}) > 1
    return isinstance(comm, GroupComm) and not alone and len(set(hosts)) == len(hosts)


def by_memory(comm: Comm, hosts: Sequence[tuple[str, int]], linked: bool) -> bool:
    """Whether `connect` would have ranks share memory, where all say (linked) whether their devices reach each other."""
    wish = os.environ.get("ZEROLITE_CONNECT", "auto")
    return _together(comm, hosts) and (wish == "memory" or (wish == "auto" and not linked))


def connect(comm: Comm, hosts: list[tuple[str, int]], link: Link) -> Comm:
    """Shared pinned memory where all ranks are processes of one host whose devices no fast link connects (a collective).

    ZEROLITE_CONNECT=memory|group decides instead. Raises ValueError for anything else.
    """
    wish = os.environ.get("ZEROLITE_CONNECT", "auto")
    if wish not in ("auto", "memory", "group"):
        raise ValueError(f"ZEROLITE_CONNECT: expected 'auto', 'memory' or 'group', got {wish!r}")
    if not _together(comm, hosts) or wish == "group":
        return comm
    linked = comm.share(link.linked(comm.size), "set-up devices")
    if wish == "auto" and all(linked):
        return comm
    assert isinstance(comm, GroupComm)

    def make() -> Comm:
        made = PinnedComm(comm, [host for host, _ in hosts], link)
        Segment(PAGE, made.place, made.share_here, private=False)
        return made

    return if_shared(comm, make)
