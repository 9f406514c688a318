"""Gradient rounds of the ranks of one host, read where they are.

Every rank packs a part of a round into its own slot of a region and raises a flag; the owner of a shard reads the N
slices in place, inside the update or the average.

    region    | slot of rank 0 | slot of rank 1 | ...      written by that rank, read by all
    flags     | posted, read, for each rank | of lane 0 | of lane 1 | ...

Where gradients rest whole, each lane has a region of its own, and a round is one part. Where they rest sharded, lanes cut
rounds into parts of `parts.PART` bytes, which take turns on a few regions in the order in which they go out. So what is
held does not grow with the model or its largest parameter, and pages stay: a page's first use costs microseconds, as much as
moving its bytes a hundred times.
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
from zerolite.layout import STAGGER
from zerolite.parts import part_room, parts_of, regions_of

if TYPE_CHECKING:
    from zerolite.comm.shared import SharedComm

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # dtype of a round, in its flag
_STILL_READ = "exchange (a slot still read)"


class Region:
    """A slot for each rank of the host, lent to one exchange of a lane at a time."""

    holder: tuple[SharedLane, int] | None  # the lane that it was last lent to, and the number of its exchange

    def __init__(self, comm: SharedComm, size: int, narrow: int) -> None:
        self.comm = comm
        self.slot = -(-size // PAGE) * PAGE + STAGGER  # pages that are never written take no memory
        self.narrow = narrow  # bytes of the largest round in compute dtype
        self.wide = False  # pages past `narrow` were written
        self.used = 0  # bytes of this rank's slot that were written: their pages stay
        self.holder = None
        self.segment = Segment(comm.places * self.slot, comm.place, comm.share_here, private=False)
        comm.pin(self.segment.shared)

    def lend(self, lane: SharedLane, size: int) -> Tensor:
        """`size` bytes of this rank's slot, uint8, once every rank has read what it held."""
        before, number = self.holder or (lane, lane.rounds + 1)
        if number <= before.rounds:  # else what was packed was thrown away (zero_grad() after a backward), and nobody read it
            before.settle(number)
            before.read.wait(number, _STILL_READ)
        self.holder = lane, lane.rounds + 1
        start = self.comm.place * self.slot
        if size > self.narrow:
            self.wide = True
        elif self.wide and not self.comm.pins:  # pinned pages stay
            self.segment.free(start + self.narrow, start + self.slot)
            self.wide = False
            self.used = min(self.used, self.narrow)
        self.used = max(self.used, size)
        return self.segment.shared[start : start + size]

    def own(self, size: int) -> Tensor:
        """The first bytes of this rank's slot."""
        start = self.comm.place * self.slot
        return self.segment.shared[start : start + size]


class Rotation:
    """Regions that are lent in turns."""

    def __init__(self, regions: list[Region], room: int | None) -> None:
        self.regions = regions
        self.room = room  # bytes of a slot, which parts are cut to; None: a round is one part
        self.turn = -1

    def lend(self, lane: SharedLane, size: int) -> tuple[Region, Tensor]:
        """The next region, and this rank's slot in it."""
        self.turn = (self.turn + 1) % len(self.regions)
        region = self.regions[self.turn]
        return region, region.lend(lane, size)

    def kept(self) -> list[Tensor]:
        """This rank's slots."""
        sizes = [region.used if self.room is None else self.room for region in self.regions]
        return [region.own(size) for region, size in zip(self.regions, sizes, strict=True) if size]


class SharedLane:
    """One bucket's rounds in shared memory (see lane.Lane)."""

    region: Region  # that of the next exchange, or of the last one

    def __init__(self, comm: SharedComm, numel: int, rotation: Rotation, flags: Tensor, transient: bool) -> None:
        self.comm = comm
        self.shard = numel // comm.size
        self.rotation = rotation
        self.transient = transient
        self.placed = True
        self.mean = 1.0 / comm.size
        self.lasting = not transient
        half = Flags.nbytes(comm.places)
        self.posted = Flags(comm, flags[:half])
        self.read = Flags(comm, flags[half:])
        self.rounds = self.seen = 0  # exchanged; told as read
        self.codes = 0  # dtypes of the last exchanges, two bits each: ranks can be so many parts ahead of each other
        self.slots: dict[int, Tensor] = {}  # what exchanges hold of this rank's slots, by number, until they are read
        self.settle: Callable[[int], None] = self.done

    def cuts(self, dtype: torch.dtype) -> list[tuple[int, int]]:
        room = self.rotation.room
        return [(0, self.shard)] if room is None else parts_of(self.shard, self.comm.size, dtype.itemsize, room)

    def take(self, dtype: torch.dtype, width: int) -> Tensor:
        self.region, slot = self.rotation.lend(self, self.comm.size * width * dtype.itemsize)
        return slot.view(dtype)

    def _slices(self, width: int, dtype: torch.dtype) -> list[Tensor]:
        """The slices for this rank in the slots of this host's ranks, in rank order."""
        size = width * dtype.itemsize
        starts = [place * self.region.slot + self.comm.rank * size for place in range(self.comm.places)]
        return [self.region.segment.shared[start : start + size].view(dtype) for start in starts]

    def fill(self, full: Tensor) -> Callable[[], None] | None:
        """Begins to bring `full` to this rank's slot; what waits until it is there, or None: it is the slot."""
        return None

    def exchange(self, full: Tensor, what: str) -> Pending:
        filled = self.fill(full)
        self.rounds += 1
        self.slots[self.rounds] = self.region.own(full.nbytes)
        number, code = self.rounds, _CODES[full.dtype]
        self.codes = (self.codes << 2 | code) & 0xFF
        mark = number << 8 | self.codes
        if filled is None:
            self.posted.raise_to(mark)
        sources, far = self.comm.across(full, self._slices(full.numel() // self.comm.size, full.dtype), what)

        def wait() -> None:
            if filled is not None:
                filled()
                self.posted.raise_to(mark)
            if far is not None:
                far.wait()
            self.posted.wait(number << 8, what)
            if any((value & 0xFF) >> 2 * ((value >> 8) - number) & 3 != code for value in self.posted.values()):
                raise RankError(
                    f"ranks disagree in '{what}': some send {full.dtype}, others do not. Use no_sync() on every rank."
                )

        return Arriving(wait, sources)

    def done(self, number: int | None = None) -> None:
        number = self.rounds if number is None else number
        if number > self.seen:  # a counter never falls
            for read in range(self.seen + 1, number + 1):
                self.slots.pop(read, None)
            self.seen = number
            self.read.raise_to(number)

    def holds(self, number: int, sources: Sequence[Tensor]) -> list[Tensor]:
        near = {region.segment.shared.data_ptr() for region in self.rotation.regions}
        far = [source for source in sources if source.untyped_storage().data_ptr() not in near]  # of other hosts
        own = self.slots.get(number)
        return far if own is None else [own, *far]

    def kept(self) -> list[Tensor]:
        return self.rotation.kept()


def shared_lanes(comm: SharedComm, specs: Sequence[LaneSpec], make: Callable[..., SharedLane] = SharedLane) -> list[Lane]:
    """Lanes for buckets in the order in which they go out (a collective)."""
    transient = specs[0].transient
    each = 2 * Flags.nbytes(comm.places)
    flags = Segment(each * len(specs), comm.place, comm.share_here, private=False)
    if transient:
        sizes = [(spec.numel // comm.size, spec.dtype.itemsize) for spec in specs]
        room = part_room(comm.size, sizes)
        rotations = [Rotation([Region(comm, room, room) for _ in range(regions_of(comm.size, sizes))], room)] * len(specs)
    else:  # fp32 rounds fit
        rotations = [Rotation([Region(comm, s.numel * 4, s.numel * s.dtype.itemsize)], None) for s in specs]
    return [
        make(comm, spec.numel, rotation, flags.shared[k * each : (k + 1) * each], transient)
        for k, (spec, rotation) in enumerate(zip(specs, rotations, strict=True))
    ]
