"""The most that one backward holds beside what rests, where parameters rest sharded: the schedule of units, in integers.

Buckets go out in one order, last parameters first. Unit k is reached while the unit after it is still whole and the one
before it is prefetched; then the one after it is released. The root stays whole.

    reach unit 3     whole: root, 4, 3, 2      in flight: the last bucket of unit 4
    bucket of 3      whole: root, 3, 2         in flight: this bucket and the one before it
    reach unit 2     whole: root, 3, 2, 1

Gradients of the root that come before the units' (a head) wait as autograd gave them, since their buckets go out last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Trip(NamedTuple):
    """One bucket in the order of the forward: bytes."""

    unit: int  # 0: the root
    full: int  # the whole bucket, parameters or gradients
    arrived: int  # its gradients without padding; 0 where it is not trained
    early: int  # of these, what comes before the gradients of the units
    packed: int  # its packed copy, beside what rests
    flight: int  # slices to and from other ranks
    missing: int  # of what rests after the backward, what is not there before its turn


class Most(NamedTuple):
    """Bytes at the highest moment."""

    units: int  # whole units
    flight: int  # gradients on their way, less those at rest that are still to come


def most(trips: Sequence[Trip]) -> Most:
    """The highest moment of a backward."""
    whole: dict[int, int] = {}
    for trip in trips:
        whole[trip.unit] = whole.get(trip.unit, 0) + trip.full
    units = sorted(set(whole) - {0})
    missing = sum(trip.missing for trip in trips)
    early = sum(trip.early for trip in trips)
    before, reached = 0, 0
    moments = [Most(0, 0)]

    def look(near: Sequence[int], flight: int) -> None:
        held = sum(whole.get(unit, 0) for unit in (0, *near))
        moments.append(Most(held + min(flight, 0), max(flight, 0)))

    for trip in reversed(trips):  # the root's buckets are listed first, so they go out last
        at = units.index(trip.unit) if trip.unit else 0
        near = units[max(at - 1, 0) : at + 1] if trip.unit else []
        if trip.unit != reached and trip.unit:
            look(units[max(at - 1, 0) : at + 2], early + before - missing)
        reached = trip.unit
        if trip.arrived:
            early -= trip.early
            missing -= trip.missing
            look(near, early + max(trip.arrived + trip.packed, trip.flight) + before - missing)
            before = trip.flight
    return max(moments, key=sum)


def passing(buckets: Sequence[int], averages: Sequence[int]) -> int:
    """The most that a round takes while its buckets go out one after the other, beside what is packed and earlier sums.

    The bucket that is averaged and the next one have slices. Averages stay (`averages`: as far as earlier sums do not hold
    them), and a packed copy is gone once its slices are averaged.
    """
    found, beside = 0, 0
    for slices, after, new in zip(buckets, [*buckets[1:], 0], averages, strict=True):
        found = max(found, beside + slices + after + new)
        beside += new - slices
    return found


def top(values: Sequence[int]) -> int:
    """The largest value, or 0."""
    return max(values, default=0)


def pair(values: Sequence[int]) -> int:
    """The largest sum of two neighbours."""
    return max((a + b for a, b in zip(values, [*values[1:], 0], strict=True)), default=0)
