"""A lane carries one bucket's gradient rounds between ranks.

for start, stop in lane.cuts(dtype):        the parts of a round: ranges of each rank's shard, in order
    full = lane.take(dtype, stop - start)   this rank's buffer; all of it is to be written, padding too
    pending = lane.exchange(full)           it is complete; pending.wait() gives the N ranks' slices for this rank
lane.done(number)                           the slices of an exchange are not read any more

    bucket   | shard of rank 0: part 0, part 1 | shard of rank 1: part 0, part 1 |
    full     | part 0 of shard 0 | part 0 of shard 1 |, then the same of part 1

Transient lanes (gradients rest sharded) may share memory: a part is packed when it is its turn to go out, and `settle`
is called if an earlier one must be read first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zerolite.comm import Comm, Pending


@dataclass(frozen=True)
class LaneSpec:
    """What a lane is to carry: a bucket of `numel` elements in compute dtype (wider where a round holds local fp32 sums).

    transient  rounds are averaged as they come and not kept
    scatter    the group's own reduce-scatter instead of an exchange (Plan.scatters)
    """

    numel: int
    dtype: torch.dtype
    transient: bool
    scatter: bool


class Lane(Protocol):
    """How one bucket's rounds travel."""

    transient: bool  # rounds are averaged as they come; the others stay where they are until the step
    placed: bool  # what goes out must lie where take() says, else any tensor may
    mean: float  # factor from the sum of an exchange's results to the average over ranks
    lasting: bool  # the slices stay readable until done() without memory of their own
    rounds: int  # exchanges so far
    settle: Callable[[int], None]  # reads what is in flight up to an exchange (counted from 1); set by whoever exchanges

    def cuts(self, dtype: torch.dtype) -> list[tuple[int, int]]:
        """The element ranges of a shard that travel one after the other."""
        ...

    def take(self, dtype: torch.dtype, width: int) -> Tensor:
        """A 1D buffer for a part of this rank's round: `width` elements for each rank, to be written."""
        ...

    def exchange(self, full: Tensor, what: str) -> Pending:
        """Sends a part; the result has shape (ranks, width), or is a list of ranks 1D tensors."""
        ...

    def done(self, number: int | None = None) -> None:
        """The results up to exchange `number` (None: the last) are not read any more, or never will be."""
        ...

    def holds(self, number: int, sources: Sequence[Tensor]) -> list[Tensor]:
        """This rank's own memory behind exchange `number`, whose result is `sources`."""
        ...

    def kept(self) -> list[Tensor]:
        """This rank's memory that stays between rounds (lanes may share it)."""
        ...


class MessageLane:
    """Rounds as messages: a fresh buffer each time, and an all-to-all of slices."""

    def __init__(self, comm: Comm, spec: LaneSpec, device: torch.device) -> None:
        self.comm = comm
        self.numel = spec.numel
        self.device = device
        self.transient = spec.transient
        self.placed = False
        self.mean = 1.0 / comm.size
        self.lasting = False
        self.rounds = 0  # messages are their readers' own: nobody asks which
        self.settle: Callable[[int], None] = self.done
        # what was packed, and the exchange of it: weakly, for the result is its reader's
        self.sent: tuple[Callable[[], Tensor | None], Callable[[], Pending | None]] = (lambda: None, lambda: None)

    def cuts(self, dtype: torch.dtype) -> list[tuple[int, int]]:
        return [(0, self.numel // self.comm.size)]

    def take(self, dtype: torch.dtype, width: int) -> Tensor:
        return torch.empty(self.comm.size * width, dtype=dtype, device=self.device)

    def exchange(self, full: Tensor, what: str) -> Pending:
        pending = self.comm.exchange(full, what)
        self.sent = weakref.ref(full), weakref.ref(pending)
        return pending

    def done(self, number: int | None = None) -> None:
        """The message is its reader's own."""

    def holds(self, number: int, sources: Sequence[Tensor]) -> list[Tensor]:
        # A group lets go of a sent message at some moment after it has gone, in a thread of its own.
        pending = self.sent[1]()
        sent = self.sent[0]() if pending is not None and pending.under_way else None
        return [*sources] if sent is None else [*sources, sent]

    def kept(self) -> list[Tensor]:
        return []


def message_lanes(comm: Comm, specs: Sequence[LaneSpec], device: torch.device) -> list[Lane]:
    """A lane for each bucket."""
    return [MessageLane(comm, spec, device) for spec in specs]
