"""One bucket's gradients on their way from autograd to the update.

    put(slot, grad)    one parameter's gradient of this round; kept by reference until the bucket is packed
    hold(slot, grad)   the same under no_sync(): added to a local fp32 sum instead
    pack()             this round's gradients, added to the local sum if there is one, in one padded tensor
    start(), finish()  the exchange with the other ranks, and the average of what came

A *round* is what one synchronised backward contributes. Its average over ranks is summed in rank order in
fp32 and rounded once to the round's dtype: the compute dtype, as if one device had computed it, or fp32
where a local sum took part. Further rounds are added to an fp32 average, which is allocated only then.

A parameter can arrive again in one backward (a module under a reentrant checkpoint that is used twice). The first
gradient is of the round, the others are a further one, in fp32, that goes out when the backward is over, on all
ranks if on any: ranks exchange alike, and the bits of a parameter never depend on its neighbours.
"""

from __future__ import annotations

import functools
from operator import attrgetter

import torch
from torch import Tensor, nn

from zerolite.arrivals import Arrivals
from zerolite.average import Average, Cut, Flight
from zerolite.comm import Comm
from zerolite.comm.lane import Lane
from zerolite.dtypes import fills, is_flat
from zerolite.kernels import Packing, Window, exceeds_, pack_
from zerolite.layout import Layout, Piece

# Finite gradients below this cannot overflow in any sum that a step takes; above it the exact check decides.
_SUSPECT = {torch.float32: 2.0**100, torch.bfloat16: 2.0**100, torch.float16: float("inf")}
#: Gradients that wait to be packed, where they can rest packed or are small: what is packed soon is still in the caches, its
#: memory serves the next gradient, and the garbage collector never sees 10,000 tensors more at once.
_PORTION = 256
_SMALL = 16384  # bytes of gradients that are packed once more to save that, on average over the bucket
_dtype = attrgetter("dtype")
_trained = attrgetter("requires_grad")


class Gradients:
    """Gradients of one bucket on one rank."""

    name: str  # of the bucket
    layout: Layout
    comm: Comm
    lane: Lane  # how rounds travel
    dtype: torch.dtype  # compute dtype
    views: list[tuple[torch.Size, tuple[int, ...]]]  # shape and strides of each slot's parameter
    flat: list[bool]  # whether a slot's parameter is contiguous
    offsets: list[int]  # where each slot begins
    pieces: list[Piece]  # parts of parameters in this rank's shard
    suspect: Tensor  # int64 [1], shared by all buckets: something packed since the last step is not plainly finite
    expected: int  # arrivals that complete a round
    everything: bool  # the last round was complete, and nothing was frozen
    early: bool  # gradients are packed before the round is complete
    arrivals: Arrivals
    arrived: dict[int, Tensor]  # slot -> gradient of this round, not packed yet (those of `arrivals`)
    before: int  # gradients that came and are not among `arrived`
    packed: set[int]  # slots of this round in `full`
    wide: bool  # this round began with the local sum, so it travels in fp32
    full: Tensor | None  # 1D, layout.numel, compute dtype or (wide) fp32: this round's gradients of this rank
    local: Tensor | None  # 1D, layout.numel, fp32: sum of what came under no_sync(), or again in one backward
    base: Tensor | None  # the local sum that this (wide) round begins with, until it is packed
    flights: list[Flight]  # the exchanges under way
    taken: Flight | None  # the exchange that is being summed
    average: Average  # of the rounds so far, in this rank's shard

    def __init__(
        self,
        name: str,
        layout: Layout,
        comm: Comm,
        lane: Lane,
        like: list[Tensor],
        dtype: torch.dtype,
        suspect: Tensor,
        average: Average,
    ) -> None:
        self.name = name
        self.layout = layout
        self.comm = comm
        self.lane = lane
        self.dtype = dtype
        self.views = [(p.shape, p.stride()) for p in like]
        self.flat = [is_flat(p.shape, p.stride()) for p in like]
        self.offsets = [slot.offset for slot in layout.slots]
        self.pieces = list(layout.pieces(*layout.span(comm.rank)))
        self.suspect = suspect
        self.expected, self.everything, self.before = len(layout.slots), False, 0
        self.early = not lane.transient or layout.numel * dtype.itemsize < len(layout.slots) * _SMALL
        self.arrivals = Arrivals()
        self.arrived = self.arrivals.grads
        self.average = average
        self.lane.settle = self.finish
        self.flights, self.taken = [], None
        self.clear()

    def clear(self) -> None:
        """Forgets every gradient."""
        if self.flights or self.taken is not None:
            self.lane.done()
        self._empty()
        self.packed, self.wide = set(), False
        self.close()
        self.arrivals.gone, self.arrivals.repeats = set(), {}
        self.full = self.local = self.base = self.taken = None
        self.flights = []
        self.average.clear(self.lane.transient)

    def _empty(self) -> None:
        self.before += len(self.arrived)
        self.arrived.clear()

    @property
    def came(self) -> int:
        """Counts gradients that came, from the start."""
        return self.before + len(self.arrived)

    def expect(self, params: list[nn.Parameter]) -> None:
        """A backward begins. Only where the last one brought less than everything it is counted what can come."""
        self.expected = len(params) if self.everything else sum(map(_trained, params))
        self.everything = False
        self.arrivals.gone = set()
        self.close()

    def open(self, task: int) -> None:
        """Hooks may put first gradients of one backward among the arrivals by themselves."""
        left = self.expected - len(self.packed)
        self.arrivals.task, self.arrivals.wanted = task, min(left, _PORTION) if self.early and not self.wide else left

    def close(self) -> None:
        """Every gradient goes through Reducer.collect."""
        self.arrivals.task = -1

    @property
    def complete(self) -> bool:
        """Whether every expected gradient of this round is here."""
        return len(self.arrived) + len(self.packed) >= self.expected

    @property
    def waiting(self) -> bool:
        """Whether something was collected that has not gone out."""
        return self.left or self.again

    @property
    def left(self) -> bool:
        """Whether some of this round has not gone out."""
        return bool(self.arrived or self.packed or self.wide)

    @property
    def again(self) -> bool:
        """Whether a further round of fp32 is to follow: what came under no_sync(), or again in one backward."""
        return self.local is not None or bool(self.arrivals.repeats)

    def repeat(self, slot: int, grad: Tensor) -> None:
        """Takes a gradient that comes again: by reference, and from the third one on in the local sum."""
        if slot in self.arrivals.repeats:
            self.hold(slot, grad)
        else:
            self.before += 1
            self.arrivals.repeats[slot] = grad

    @property
    def shared(self) -> bool:
        return bool(self.flights) or self.average.value is not None  # something was exchanged

    def put(self, slot: int, grad: Tensor) -> bool:
        """Takes one gradient of this round (shape and dtype of the parameter); whether the round is complete."""
        self.arrived[slot] = grad
        return self.filled()

    def filled(self) -> bool:
        """Packs a round that is complete, where it can rest packed; whether it is."""
        if not self.complete:
            self._portion()
            return False
        self.everything = len(self.arrived) + len(self.packed) >= len(self.layout.slots)
        if not self.lane.transient:
            self.pack()
        return True

    def _portion(self) -> None:
        """Packs what hooks have brought of a round that can rest packed, where there is enough of it."""
        if self.arrivals.task < 0 or len(self.arrived) < self.arrivals.wanted:
            return
        plain = self._plain()  # each other one is followed by a look at all of `full`
        if plain:
            self.pack()
        self.arrivals.wanted = min(self.expected - len(self.packed), _PORTION if plain else len(self.layout.slots))

    def hold(self, slot: int, grad: Tensor) -> None:
        """Adds one gradient to the local fp32 sum."""
        if self.local is None:
            self.local = torch.zeros(self.layout.numel, dtype=torch.float32, device=grad.device)
        self.before += 1
        self.view(self.local, slot).add_(grad)

    def widen(self) -> None:
        """The next round begins with the local sum, and what came again."""
        assert not self.arrived and not self.packed
        self.base, self.local, self.wide = self.local, None, True
        self.before -= len(self.arrivals.repeats)
        self.arrived.update(self.arrivals.repeats)
        self.arrivals.repeats = {}

    def view(self, flat: Tensor, slot: int) -> Tensor:
        """The parameter-shaped view of `slot` in a bucket-shaped tensor."""
        shape, stride = self.views[slot]
        return flat.as_strided(shape, stride, flat.storage_offset() + self.layout.slots[slot].offset)

    def pack(self) -> None:
        """Copies what has arrived into `full`, where the rest is 0, and looks once for values that are not plainly finite."""
        if self.full is not None and not self.arrived:
            return
        fresh = self.full is None
        if self.full is None:
            if self.lane.transient:
                self.full = self.suspect.new_empty(self.layout.numel, dtype=self.dtype)
            else:
                self.full = self.lane.take(torch.float32 if self.wide else self.dtype, self.layout.shard)
        full = self.full
        if not self.wide:
            pack_(full, *self._blocks(), fresh, self.suspect, _SUSPECT[self.dtype])
        else:
            if fresh:
                full.zero_() if self.base is None else full.copy_(self.base)
                self.base = None
            self._add_to(full)
            exceeds_(self.suspect, full, _SUSPECT[full.dtype])
        self.packed.update(self.arrived)
        self.comm.ledger.note("pack", self.name)  # while both are held
        self._empty()

    def _blocks(self) -> tuple[list[Tensor], list[int]]:
        """What has arrived, each as one block of memory like its parameter's range in `full`, and where that begins."""
        if self._plain():
            slots = sorted(self.arrived)
            return list(map(self.arrived.__getitem__, slots)), list(map(self.offsets.__getitem__, slots))
        blocks = []
        for slot in sorted(self.arrived):
            block = self.arrived[slot]
            if not self._plain(slot):
                shape, stride = self.views[slot]
                block = torch.empty(block.numel(), dtype=self.dtype, device=block.device)
                block.as_strided(shape, stride).copy_(self.arrived[slot])
            blocks.append(block)
        return blocks, [self.offsets[slot] for slot in sorted(self.arrived)]

    def _add_to(self, flat: Tensor) -> None:
        for slot, grad in self.arrived.items():
            self.view(flat, slot).add_(grad)

    def _plain(self, slot: int | None = None) -> bool:
        """Whether a gradient that arrived, or each, is one block of memory like its parameter's range in `full`."""
        slots = self.arrived if slot is None else [slot]
        grads = self.arrived.values() if slot is None else [self.arrived[slot]]
        if not (set(map(_dtype, grads)) <= {self.dtype} and all(map(Tensor.is_contiguous, grads))):
            return False
        return all(map(self.flat.__getitem__, slots))

    def look(self) -> None:
        """Settles `suspect` for what was collected, as far as its turn to be packed has come."""
        seen = bool(self.arrived) and not self.lane.transient
        if seen:
            self.pack()
        if self.again or (not seen and (self.arrived or self.wide)):
            self.suspect.fill_(1)  # the exact check decides

    def start(self) -> None:
        """Begins the exchange of this round; slots without a gradient count as 0."""
        self.finish()
        self.arrivals.gone.update(self.packed, self.arrived)
        if self.lane.transient:
            self._send()
        else:
            self.pack()
            self._fly((0, self.layout.shard))
        self.wide = False
        self.packed = set()
        self.close()
        self.comm.ledger.note("exchange", self.name)

    def _send(self) -> None:
        """Packs and exchanges one part after the other; `take` averages what its memory held before.

        A large parameter has a bucket of its own: its gradient goes out as it is, if it needs no padding.
        """
        dtype = self.dtype
        if self.wide:
            dtype = torch.float32
            if self.base is None:
                self.base = torch.zeros(self.layout.numel, dtype=dtype, device=self.suspect.device)
            self._add_to(self.base)
        elif self.full is not None:  # most of it is packed
            self.pack()
            self.base, self.full = self.full, None
        blocks, offsets = self._blocks() if self.base is None else ([self.base], [0])
        ready = not self.lane.placed and len(blocks) == 1 and fills(blocks[0], self.layout.numel)
        packing = None if ready else Packing(blocks, offsets, dtype, self.suspect.device)
        for start, stop in self.lane.cuts(dtype):
            if packing is None:
                self.full = blocks[0].view(-1)
                exceeds_(self.suspect, self.full, _SUSPECT[dtype])
            else:
                self.full = self.lane.take(dtype, stop - start)
                window = Window(start, stop - start, self.layout.shard)
                packing.into(self.full, True, self.suspect, _SUSPECT[dtype], window)
            if stop == self.layout.shard:
                self.comm.ledger.note("pack", self.name)  # while both are held
                self.base = None
                self._empty()
            self._fly((start, stop))

    def _fly(self, cut: Cut) -> None:
        """Exchanges what is packed."""
        assert self.full is not None
        pending = self.lane.exchange(self.full, f"exchange {self.name}")
        self.flights.append(Flight(pending, self.lane.rounds, cut))
        self.full = None

    @property
    def lone(self) -> bool:
        """Whether one exchange under way is all that there is since the last step, so that it can be summed in the update."""
        return len(self.flights) == 1 and self.average.value is None and not self.average.apart

    def peek(self) -> tuple[list[Tensor], float]:
        """As `sources`, without using them up; no sources where there is no gradient."""
        if self.lone:
            return list(self.flights[0].pending.wait()), self.lane.mean
        self.finish()
        value = self.average.settled()
        return ([] if value is None else [value]), 1.0

    def sources(self) -> tuple[list[Tensor], float]:
        """What to sum, and the factor of the sum: the sources of a lone round in flight, else the average.

        An average on the host may be on its way: it is there once `average.coming` is reached.
        """
        assert not self.waiting, f"bucket {self.name}: a gradient would be dropped"
        if self.lone:
            self.taken = self.flights.pop()
            return list(self.taken.pending.wait()), self.lane.mean
        self.finish()
        if self.average.value is None:
            self.average.value = self.average.nothing(self.dtype)
        return [self.average.value], 1.0

    def finish(self, number: int | None = None) -> None:
        """Averages what is in flight (number: up to that exchange)."""
        while self.flights and (number is None or self.flights[0].number <= number):
            self.taken = flight = self.flights.pop(0)
            done = functools.partial(self.lane.done, flight.number)
            self.average.receive(flight.pending, self.lane.mean, done, flight.cut)
            self.comm.ledger.note("average", self.name)  # while both are held
            self.taken = None

    def multiply(self, slot: int, factor: float) -> None:
        """Scales what was averaged of one slot, in fp32."""
        self.finish()
        if self.average.value is not None:
            for part in self._parts(slot, self.average.widen()):
                part.mul_(factor)

    def discard(self, slot: int) -> None:
        """Forgets one parameter's gradient in every form."""
        self.before += self.arrived.pop(slot, None) is not None
        self.arrivals.repeats.pop(slot, None)
        self.packed.discard(slot)
        self.close()
        self.finish()
        for flat in (self.full, self.local, self.base):
            if flat is not None:
                self.view(flat, slot).zero_()
        value = self.average.settled()
        if value is not None:
            self.average.squares = None
            for part in self._parts(slot, value):
                part.zero_()

    def _parts(self, slot: int, value: Tensor) -> list[Tensor]:
        return [value[p.offset : p.offset + p.stop - p.start] for p in self.pieces if p.slot == slot]

    def resting(self) -> list[Tensor]:
        """What holds gradients where they rest: averages, and a packed round where gradients rest whole."""
        whole = None if self.lane.transient else self.full
        return self.average.held() + ([whole] if whole is not None else [])

    def flying(self) -> list[Tensor]:
        """What holds gradients on their way: not packed, packed, summed under no_sync(), sent, being summed."""
        packed = self.full if self.lane.transient else None
        held = [t for t in (packed, self.local, self.base) if t is not None]
        held += [*self.arrived.values(), *self.arrivals.repeats.values()]
        flights = self.flights if self.taken is None else [self.taken, *self.flights]
        for flight in flights:
            held += self.lane.holds(flight.number, list(flight.pending.result))
        return held + self.average.leaving()
