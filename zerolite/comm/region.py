"""Gradient rounds of the ranks of one host, read where they are.

Every rank packs a round into its own slot of a region and raises a flag; the owner of a shard reads the N slices in
place, inside the update or the average.

    region    | slot of rank 0 | slot of rank 1 | ...      written by that rank, read by all
    flags     | posted, read, for each rank | of lane 0 | of lane 1 | ...

Where gradients rest whole, each lane has a region of its own. Where they rest sharded, lanes take turns on `TURNS`
regions in the order in which buckets go out, so that two buckets in flight are all that is held however large the
model is, and pages stay: a page's first use costs microseconds, as much as moving its bytes a hundred times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zerolite.comm import Pending
from zerolite.comm.flags import Arriving, Flags
from zerolite.comm.lane import Lane, LaneSpec
from zerolite.comm.ledger import RankError
from zerolite.comm.segment import PAGE, Segment
from zerolite.placement import TURNS  # a rank can be one bucket ahead of the slowest

if TYPE_CHECKING:
    from zerolite.comm.shared import SharedComm

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # dtype of a round, in its flag
_STILL_READ = "exchange (a slot still read)"


class Region:
    """A slot for each rank of the host, lent to one lane at a time."""

    holder: SharedLane | None

    def __init__(self, comm: SharedComm, numel: int, narrow: int) -> None:
        self.comm = comm
        self.slot = -(-numel * 4 // PAGE) * PAGE  # fp32 rounds fit; pages that are never written take no memory
        self.narrow = narrow  # bytes of the largest round in compute dtype
        self.wide = False  # pages past `narrow` were written
        self.used = 0  # bytes of this rank's slot that were written: their pages stay
        self.holder = None
        self.segment = Segment(comm.places * self.slot, comm.place, comm.share_here, private=False)
        comm.pin(self.segment.shared)

    def lend(self, lane: SharedLane, dtype: torch.dtype) -> Tensor:
        """This rank's slot, uint8, once every rank has read what it held."""
        if self.holder is not None:
            if self.holder.open:
                self.holder.settle()
            self.holder.read.wait(self.holder.rounds, _STILL_READ)
        self.holder = lane
        start = self.comm.place * self.slot
        if dtype == torch.float32:
            self.wide = True
        elif self.wide and not self.comm.pins:  # pinned pages stay
            self.segment.free(start + self.narrow, start + self.slot)
            self.wide = False
            self.used = min(self.used, self.narrow)
        self.used = max(self.used, lane.numel * dtype.itemsize)
        return self.segment.shared[start : start + self.slot]


class SharedLane:
    """One bucket's rounds in shared memory (see lane.Lane)."""

    def __init__(self, comm: SharedComm, numel: int, region: Region, flags: Tensor, transient: bool) -> None:
        self.comm = comm
        self.numel = numel
        self.region = region
        self.transient = transient
        self.mean = 1.0 / comm.size
        self.lasting = not transient
        half = Flags.nbytes(comm.places)
        self.posted = Flags(comm, flags[:half])
        self.read = Flags(comm, flags[half:])
        self.rounds = self.seen = 0  # exchanged; told as read
        self.open = False  # a round was exchanged and not read yet
        self.settle: Callable[[], None] = self.done

    def take(self, dtype: torch.dtype) -> Tensor:
        return self.region.lend(self, dtype)[: self.numel * dtype.itemsize].view(dtype)

    def _slices(self, dtype: torch.dtype) -> list[Tensor]:
        """The slices for this rank in the slots of this host's ranks, in rank order."""
        shard = self.numel // self.comm.size * dtype.itemsize
        starts = [place * self.region.slot + self.comm.rank * shard for place in range(self.comm.places)]
        return [self.region.segment.shared[start : start + shard].view(dtype) for start in starts]

    def fill(self, full: Tensor) -> Callable[[], None] | None:
        """Begins to bring `full` to this rank's slot; what waits until it is there, or None: it is the slot."""
        return None

    def exchange(self, full: Tensor, what: str) -> Pending:
        filled = self.fill(full)
        self.rounds += 1
        self.open = True
        mark = self.rounds * 4 + _CODES[full.dtype]
        if filled is None:
            self.posted.raise_to(mark)
        sources, far = self.comm.across(full, self._slices(full.dtype), what)

        def wait() -> None:
            if filled is not None:
                filled()
                self.posted.raise_to(mark)
            if far is not None:
                far.wait()
            self.posted.wait(mark // 4 * 4, what)
            if any(value != mark for value in self.posted.values()):
                raise RankError(
                    f"ranks disagree in '{what}': some send {full.dtype}, others do not. Use no_sync() on every rank."
                )

        return Arriving(wait, sources)

    def done(self, number: int | None = None) -> None:
        number = self.rounds if number is None else number
        self.open = self.open and number < self.rounds
        if number > self.seen:  # a counter never falls
            self.seen = number
            self.read.raise_to(number)

    def _own(self, size: int) -> Tensor:
        start = self.comm.place * self.region.slot
        return self.region.segment.shared[start : start + size]

    def holds(self, sources: Sequence[Tensor]) -> list[Tensor]:
        place = self.region.segment.shared.data_ptr()
        far = [source for source in sources if source.untyped_storage().data_ptr() != place]  # of other hosts
        return [self._own(self.numel * sources[0].element_size()), *far]

    def kept(self) -> list[Tensor]:
        return [self._own(self.region.used)] if self.region.used else []


def shared_lanes(comm: SharedComm, specs: Sequence[LaneSpec], make: Callable[..., SharedLane] = SharedLane) -> list[Lane]:
    """Lanes for buckets in the order in which they go out (a collective)."""
    transient = specs[0].transient
    each = 2 * Flags.nbytes(comm.places)
    flags = Segment(each * len(specs), comm.place, comm.share_here, private=False)
    count = min(TURNS, len(specs)) if transient else len(specs)
    sizes = [(spec.numel, spec.numel * spec.dtype.itemsize) for spec in specs]
    regions = [Region(comm, *(max(column) for column in zip(*sizes[k::count], strict=True))) for k in range(count)]
    return [
        make(comm, spec.numel, regions[k % count], flags.shared[k * each : (k + 1) * each], transient)
        for k, spec in enumerate(specs)
    ]
