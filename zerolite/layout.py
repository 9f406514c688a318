"""Where each element of each parameter lives: integers only, no tensor, no process group.

A bucket is one 1D range of elements. Parameters start at multiples of ALIGN, and the bucket is padded so
that every rank's shard is a multiple of ALIGN too. For size=2 ranks and parameters of 70 and 10 elements:

    element   0        70      128   138      256
              | first   | pad   | 2nd | pad    |
    shard     |-------- rank 0 -------|--- rank 1 ---|      numel = 256, shard = 128

    pieces(0) = Piece(slot=0, start=0, stop=70, offset=0)
    pieces(1) = Piece(slot=1, start=0, stop=10, offset=0)

ALIGN makes the position of an element relative to its parameter's first one independent of the cut, modulo
ALIGN, so no vectorised loop and no group of quantised values can tell layouts apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ALIGN = 64
STAGGER = 9 * 64  # bytes by which tensors that one pass walks side by side begin apart in a page (docs/design.md)
TINY = 16  # a bucket that is filled to less than this part, beside others, is not worth a message of its own


@dataclass(frozen=True)
class Slot:
    """One parameter's elements in a bucket: [offset, offset + numel)."""

    name: str
    offset: int
    numel: int


@dataclass(frozen=True)
class Piece:
    """The part [start, stop) of the parameter in `slot`, at `offset` in a range of the bucket."""

    slot: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """A bucket's slots and its cut into `size` equal shards."""

    slots: tuple[Slot, ...]
    numel: int
    size: int

    @property
    def shard(self) -> int:
        """Elements of one rank's shard."""
        return self.numel // self.size

    @property
    def used(self) -> int:
        """Elements that belong to parameters; the rest is padding."""
        return sum(slot.numel for slot in self.slots)

    def span(self, rank: int) -> tuple[int, int]:
        """The element range [start, stop) that `rank` owns."""
        return rank * self.shard, (rank + 1) * self.shard

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """The parts of parameters inside the element range [start, stop); offsets count from `start`."""
        for index, slot in enumerate(self.slots):
            lo, hi = max(start, slot.offset), min(stop, slot.offset + slot.numel)
            if lo < hi:
                yield Piece(index, lo - slot.offset, hi - slot.offset, lo - start)


def aligned(numel: int, to: int = ALIGN) -> int:
    """`numel` rounded up to a multiple of `to`."""
    return -(-numel // to) * to


def group(numels: Sequence[int], limit: int) -> list[list[int]]:
    """Which parameters, of these sizes in their order, share a bucket of at most `limit` elements: positions.

    One that is larger than `limit` has a bucket of its own. A rest that fills less than a TINY-th of a bucket joins the first
    bucket, which goes out last: the norms that a block lists after its matrices are complete when all of its backward has run,
    and would hold up the gradients of everything before them.
    """
    groups: list[list[int]] = []
    sizes: list[int] = []
    for index, numel in enumerate(numels):
        if not groups or sizes[-1] + numel > limit:
            groups.append([])
            sizes.append(0)
        groups[-1].append(index)
        sizes[-1] += aligned(numel)
    tiny = [k > 0 and size * TINY < limit for k, size in enumerate(sizes)]
    joined = [index for small, members in zip(tiny, groups, strict=True) if small for index in members]
    kept = [members for small, members in zip(tiny, groups, strict=True) if not small]
    return [kept[0] + joined, *kept[1:]] if kept else []


def cut(parameters: Sequence[tuple[str, int]], size: int, limit: int) -> list[Layout]:
    """Cuts parameters (name, numel), in order, into buckets of about `limit` elements, as `group` says.

    A parameter is never split between buckets (its tensor must stay one view). `size` is the world size. Raises ValueError
    for size or limit below 1.
    """
    if size < 1 or limit < 1:
        raise ValueError(f"cut: expected a world size and a limit of at least 1, got {size} and {limit}")
    layouts: list[Layout] = []
    for members in group([numel for _, numel in parameters], limit):
        slots, end = [], 0
        for name, numel in (parameters[k] for k in members):
            slots.append(Slot(name, end, numel))
            end += aligned(numel)
        layouts.append(Layout(tuple(slots), aligned(end, ALIGN * size), size))
    return layouts
