"""How rounds of transient gradients are cut where ranks share memory, in integers (comm/region.py).

A round goes out part by part through a few regions in turn, so that what they hold does not grow with the largest bucket.
"""

from __future__ import annotations

from collections.abc import Sequence

from zerolite.backward import FP32, top
from zerolite.layout import ALIGN

PART = 4 << 20  # bytes of a part on one rank
REGIONS = 4  # parts that are in flight at once: as far as a rank can be ahead of the slowest


def part_room(size: int, sizes: Sequence[tuple[int, int]]) -> int:
    """Bytes of a slot for parts of buckets' rounds: as many as the largest round has, or PART.

    sizes  elements of a shard, and bytes of an element, of each bucket
    """
    return max(
        min(PART, top([size * shard * width for shard, width in sizes])), size * ALIGN * FP32
    )  # rounds that begin with local sums are fp32


def parts_of(shard: int, size: int, width: int, room: int) -> list[tuple[int, int]]:
    """Ranges of a shard that travel one after the other: those of all `size` ranks together fit into `room` bytes."""
    step = room // (size * width * ALIGN) * ALIGN
    return [(start, min(start + step, shard)) for start in range(0, max(shard, 1), step)]


def regions_of(size: int, sizes: Sequence[tuple[int, int]]) -> int:
    """Regions that parts take turns on: no more than there are parts."""
    room = part_room(size, sizes)
    return min(REGIONS, sum(len(parts_of(shard, size, width, room)) for shard, width in sizes))


def arena(size: int, sizes: Sequence[tuple[int, int]]) -> int:
    """Bytes of all slots of one rank."""
    return part_room(size, sizes) * regions_of(size, sizes)
