"""Where the average of a bucket's rounds rests, and how a round gets there.

Near   where the gradients are: summed into memory that is kept for the next step
Far    on the host, beside a device: a round is averaged on the device and copied down while the backward goes on. The
       squares of a lone round are summed on the device as it passes, so that clipping reads nothing on the host;
       further rounds are added on the host, in order, by the worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from zerolite.buffer import Leaving, Link, Mark, Reached, Ring, Room, zeros
from zerolite.comm import Pending
from zerolite.feed import Feed
from zerolite.kernels import LIMBS, reduce_, reduce_squares_, square_sum_
from zerolite.worker import Worker

Cut = tuple[int, int]  # a range of elements of a shard


class Flight(NamedTuple):
    """An exchange under way."""

    pending: Pending
    number: int  # of the lane's exchanges
    cut: Cut  # the elements of the shard that it brings


class Average(Protocol):
    """One bucket's average of rounds on one rank."""

    apart: bool  # it rests elsewhere than gradients come
    value: Tensor | None  # 1D, layout.shard: compute dtype, or fp32 after a second round; there once `coming` is reached
    coming: Mark
    squares: Tensor | None  # int64 [parts, LIMBS]: exact sums of squares of the parts of parameters; None: not known
    asked: bool  # whether the norm of this step's gradient was asked for

    def receive(self, flight: Pending, mean: float, done: Callable[[], None], cut: Cut) -> None:
        """Takes in a part of a round when it comes: the average of its sources, rounded to their dtype. `done` is called when
        they were read.

        cut  the elements of the shard that it covers; parts come in order, the first one begins the round
        """
        ...

    def settled(self) -> Tensor | None:
        """The average once it is there."""
        ...

    def widen(self) -> Tensor:
        """The average in fp32, to be written."""
        ...

    def nothing(self, dtype: torch.dtype) -> Tensor:
        """Zeros: the average of no round."""
        ...

    def clear(self, keep: bool) -> None:
        """Forgets it; keep: its memory is for the next (new pages cost more than the average itself)."""
        ...

    def held(self) -> list[Tensor]:
        """Its memory."""
        ...

    def leaving(self) -> list[Tensor]:
        """What is on its way to that memory."""
        ...


class Parts:
    """The parts of parameters in a shard: where the squares of each range of it are added."""

    def __init__(self, spans: Tensor) -> None:
        self.rows = torch.cat([spans[:, :2], torch.arange(len(spans), device=spans.device).unsqueeze(1)], 1)
        self.known: dict[Cut, Tensor] = {}

    def inside(self, cut: Cut) -> Tensor:
        """int64 (n, 3): start, stop and row of the parts in a range, relative to its start."""
        if cut not in self.known:
            start, stop = cut
            rows = self.rows.clone()
            rows[:, :2] = rows[:, :2].clamp(start, stop) - start
            self.known[cut] = rows[rows[:, 0] < rows[:, 1]]
        return self.known[cut]


class Prompt:
    """Rounds are waited for where they are taken in."""

    def leaving(self) -> list[Tensor]:
        return []

    def receive(self, flight: Pending, mean: float, done: Callable[[], None], cut: Cut) -> None:
        self._add(list(flight.wait()), mean, done, cut)

    def _add(self, sources: list[Tensor], mean: float, done: Callable[[], None], cut: Cut) -> None:
        raise NotImplementedError


class Near(Prompt):
    """An average beside the gradients."""

    apart = False

    def __init__(self, numel: int, device: torch.device, spans: Tensor) -> None:
        self.numel = numel
        self.device = device
        self.parts = Parts(spans)
        self.sums: Tensor | None = None  # from the first norm on
        self.asked = self.passing = False  # passing: squares are summed as a round passes, since the last step asked
        self.first = True  # the round that comes is the first one since the last step
        self.value: Tensor | None = None
        self.spare: Tensor | None = None
        self.coming: Mark = Reached()
        self.squares: Tensor | None = None

    def _add(self, sources: list[Tensor], mean: float, done: Callable[[], None], cut: Cut) -> None:
        start, stop = cut
        if start == 0 and self._begin(sources, mean):
            return
        assert self.value is not None
        if self.squares is not None:
            reduce_squares_(self.value[start:stop], self.squares, sources, self.parts.inside(cut), mean)
        else:
            reduce_(self.value[start:stop], sources, mean, not self.first)
        done()

    def _begin(self, sources: list[Tensor], mean: float) -> bool:
        """Makes room for a round; whether it is its own average."""
        self.first = self.value is None
        self.squares = None
        if self.value is None:
            if len(sources) == 1 and mean == 1.0:
                self.value = sources[0]
                return True
            if self.spare is None or self.spare.dtype != sources[0].dtype:
                self.spare = zeros(self.numel, sources[0].dtype, sources[0].device)
            self.value = self.spare
            if self.passing:
                if self.sums is None:
                    self.sums = torch.zeros(len(self.parts.rows), LIMBS, dtype=torch.int64, device=self.device)
                self.squares = self.sums.zero_()
        elif self.value.dtype != torch.float32 or len(sources) == 1:
            self.value, self.spare = self.value.to(torch.float32, copy=True), None
        return False

    def settled(self) -> Tensor | None:
        return self.value

    def widen(self) -> Tensor:
        assert self.value is not None
        self.value, self.spare, self.squares = self.value.float(), None, None
        return self.value

    def nothing(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.numel, dtype=dtype, device=self.device)

    def clear(self, keep: bool) -> None:
        if self.value is not None:
            self.passing, self.asked = self.asked, False
        self.value = self.squares = None
        if not keep:
            self.spare = None

    def held(self) -> list[Tensor]:
        return [t for t in (self.value, self.spare) if t is not None]


class Staging:
    """What all buckets' rounds share on their way from the device to the host."""

    def __init__(self, link: Link, worker: Worker) -> None:
        self.link = link
        self.worker = worker
        self.leaving = Leaving(link)  # averages on the device, until they are copied
        self.later = Ring(link.host)  # rounds after the first, until they are added
        self.feed: Feed | None = None  # averages rest on the device until the update; None: on the host


class Far(Prompt):
    """An average on the host, of rounds on a device."""

    apart = True

    @property
    def summed(self) -> Room:
        """Where squares are summed."""
        return self.link.near

    def __init__(self, numel: int, dtype: torch.dtype, spans: Tensor, staging: Staging) -> None:
        self.numel = numel
        self.link = staging.link
        self.staging = staging
        self.parts = Parts(spans)
        self.asked = False
        self.value: Tensor | None = None
        self.kept = {dtype: self.link.host.zeros(numel, dtype)}  # by dtype: pinning is too dear to be done in a step
        self.coming: Mark = Reached()
        self.last: Mark = Reached()  # of what was cleared: it may still be written
        self.sent: Mark | None = None  # the copy of its last round
        self.sums = torch.zeros(len(spans), LIMBS, dtype=torch.int64, device=self.summed.device)
        self.squares: Tensor | None = None

    def _add(self, sources: list[Tensor], mean: float, done: Callable[[], None], cut: Cut) -> None:
        leaving, later = self.staging.leaving, self.staging.later
        leaving.clear()  # before the next is made
        first = self.value is None
        fresh = self._average(sources, mean, first)
        done()
        if self.value is None:
            self.last.sync()
            self.value = self._room(fresh.dtype)
            self.coming = self.sent = leaving.send(self.value, fresh)
            return
        if self.value.dtype != torch.float32:
            self.widen()
        place, slot = later.lend(self.numel, fresh.dtype)
        later.used[place].sync()
        came = self.sent = leaving.send(slot, fresh)
        before, value = self.coming, self.value

        def join() -> None:
            before.sync()
            came.sync()
            reduce_(value, [slot], 1.0, True)

        self.coming = later.used[place] = self.staging.worker.submit(join)

    def _average(self, sources: list[Tensor], mean: float, first: bool) -> Tensor:
        """A round's average on the device; the squares of the first one are summed as it passes."""
        lone = len(sources) == 1 and mean == 1.0  # it is what came
        fresh = sources[0] if lone else torch.empty_like(sources[0])
        self.squares = self.sums.zero_() if first else None
        if self.squares is None and not lone:
            reduce_(fresh, sources, mean, False)
        elif self.squares is not None and lone:
            square_sum_(self.squares, sources, self.parts.rows, mean)
        elif self.squares is not None:
            reduce_squares_(fresh, self.squares, sources, self.parts.rows, mean)
        return fresh

    def settled(self) -> Tensor | None:
        self.coming.sync()
        return self.value

    def widen(self) -> Tensor:
        value = self.settled()
        assert value is not None
        if value.dtype != torch.float32:
            self.value = self._room(torch.float32).copy_(value)
        self.squares = None
        assert self.value is not None
        return self.value

    def _room(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self.kept:
            self.kept[dtype] = self.link.host.zeros(self.numel, dtype)
        return self.kept[dtype]

    def nothing(self, dtype: torch.dtype) -> Tensor:
        self.last.sync()
        return self._room(dtype).zero_()

    def clear(self, keep: bool) -> None:
        self.value = self.squares = None
        self.staging.leaving.clear()
        if not isinstance(self.coming, Reached):
            self.last, self.coming = self.coming, Reached()

    def held(self) -> list[Tensor]:
        return list(self.kept.values())

    def leaving(self) -> list[Tensor]:
        sent = self.staging.leaving
        return [sent.tensor] if sent.tensor is not None and sent.mark is self.sent else []


class Joint(Far):
    """An average on the host, of rounds that devices copy into memory which their ranks share: the worker reads them there."""

    @property
    def summed(self) -> Room:
        return self.link.host

    earlier: Tensor | None = None  # the average of the rounds before the one that comes

    def receive(self, flight: Pending, mean: float, done: Callable[[], None], cut: Cut) -> None:
        start, stop = cut
        if start == 0:
            self.earlier = self.value
            self.value = self._room(flight.result[0].dtype if self.earlier is None else torch.float32)
            self.squares = self.sums if self.earlier is None else None
        before, earlier, value = self.coming, self.earlier, self.value
        assert value is not None
        part = value[start:stop]

        def take() -> None:
            before.sync()
            sources = list(flight.wait())
            if earlier is None:
                sums = self.sums.zero_() if start == 0 else self.sums
                reduce_squares_(part, sums, sources, self.parts.inside(cut), mean)
            else:
                if earlier is not value:
                    part.copy_(earlier[start:stop])
                reduce_(part, sources, mean, True)
            done()

        self.coming = self.staging.worker.submit(take)
