"""Gradients that rest on the device and are updated on the host: chunks come down while the one before is updated.

device   g of chunk k+1  --down-->  slot 1
host                                slot 0: update chunk k (the pass reads it)     --> up, bucket by bucket (Bucket.publish)

Two slots of host memory are all that the gradients take there. The first chunk of the next bucket comes down beside the
last one of this bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from zerolite.buffer import Link, Mark, Ring
from zerolite.update import AdamWork, Work
from zerolite.writes import Pass


class Feed:
    """Host slots, and the pass over a bucket. One thread at a time.

    most  elements of a chunk; an update that cannot be cut takes as many as its bucket has
    """

    def __init__(self, link: Link, most: int) -> None:
        self.link = link
        self.most = most
        self.ring = Ring(link.host)
        self.ahead: tuple[Pass, int, Tensor, Mark] | None = None  # a chunk that was asked for before its turn

    def reserve(self, sizes: list[tuple[int, int]]) -> None:
        """Takes memory for ranges of (elements, bytes of an element): pinning is too dear to be done in a step."""
        self.ring.reserve(max((min(numel, self.most) * width for numel, width in sizes), default=0))

    def run(self, work: Pass, following: Callable[[], Pass | None] = lambda: None) -> None:
        """Updates a bucket on the host; returns when it is new.

        following  what is likely to be updated next: its first chunk is asked for at the end
        """
        param, rest = work.bucket.mine, work.bucket.rest
        chunks = list(self._chunks(work))
        for number, (start, stop, part) in enumerate(chunks, 1):
            slot, came = self._bring(work, start, stop)
            if number < len(chunks):
                self._ask(work, *chunks[number][:2])
            elif (after := following()) is not None:
                for first in self._chunks(after):
                    self._ask(after, *first[:2])
                    break
            came.sync()
            part(param[start:stop], rest[start:stop] if rest.numel() else rest, [slot], 1.0)

    def _chunks(self, work: Pass) -> Iterator[tuple[int, int, Work]]:
        """Element ranges in which there is something to update, and what updates each."""
        numel = work.bucket.mine.numel()
        if not isinstance(work.work, AdamWork):
            yield 0, numel, work.work
            return
        for start in range(0, numel, self.most):
            stop = min(start + self.most, numel)
            part = work.work.cut(start, stop)
            if part is not None:
                yield start, stop, part

    def _ask(self, work: Pass, start: int, stop: int) -> None:
        """Asks for a chunk whose turn is next; another one that was asked for is left."""
        sources = work.sources  # another thread may update it, and take them away, meanwhile
        if sources:
            self.ahead = (work, start, *self._down(sources[0], work, start, stop))

    def _bring(self, work: Pass, start: int, stop: int) -> tuple[Tensor, Mark]:
        ahead, self.ahead = self.ahead, None
        if ahead is not None and ahead[0] is work and ahead[1] == start:
            return ahead[2], ahead[3]
        return self._down(work.sources[0], work, start, stop)

    def _down(self, source: Tensor, work: Pass, start: int, stop: int) -> tuple[Tensor, Mark]:
        turn, slot = self.ring.lend(stop - start, source.dtype)
        self.ring.used[turn].sync()  # a chunk that was asked for and left
        work.coming.wait()
        mark = self.ring.used[turn] = self.link.down(slot, source[start:stop])
        return slot, mark
