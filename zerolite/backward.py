"""The most that one backward holds beside what rests, where rounds go out as they are complete: the schedule, in integers.

Buckets go out in one order, last parameters first. Where parameters rest sharded unit k is reached when the unit after it is
released, and the one before it is prefetched. The root stays whole.

    reach unit 3     whole: root, 3, 2      in flight: the last bucket of unit 4; leaving: the one before
    bucket of 3      whole: root, 3, 2      in flight: this bucket and the one before it; leaving: the one before that
    reach unit 2     whole: root, 2, 1

A round that comes from other ranks is averaged while the next one is on its way; one that needs nobody else is averaged at
once. Then it leaves, where averages rest on the host: one at a time (buffer.Leaving). Gradients of the root that come before
the units' (a final norm) wait as autograd gave them, since their buckets go out last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from zerolite.placement import Plan

FP32 = 4  # bytes of an element of a sum


class Trip(NamedTuple):
    """One bucket in the order of the forward: bytes."""

    unit: int  # 0: the root
    full: int  # the whole bucket, where it is gathered for the backward
    arrived: int  # its gradients without padding; 0 where it is not trained
    early: int  # of these, what comes before the gradients of the units
    packed: int  # its packed copy, beside what rests; less than 0: what rests is what arrived
    flight: int  # slices to and from other ranks; 0: its round is averaged at once
    missing: int  # of what rests after the backward, what is not there before its turn
    leaving: int = 0  # its average, which leaves the device
    large: bool = False  # its round is averaged before the next one is packed
    average: int = 0  # its average, where that does not rest


class Most(NamedTuple):
    """Bytes at the highest moment."""

    units: int  # whole units
    flight: int  # gradients until they are averaged, less those at rest that are still to come
    leaving: int = 0  # the average that is on its way to the host


def highest(plan: Plan) -> Most:
    """The highest moment of a plan's backward."""
    setting, found = plan.setting, []
    rounds, far = setting.micro_batches, plan.size - setting.here if setting.shared else plan.size
    limit = most_ahead(plan, [row.full for row in plan.trained])
    for row in plan.rows:
        full, packed, flight, missing = row.full, 0, 0, 0
        leaves = plan.leaves and not row.kept
        if rounds == 2:  # sums that are not fp32 yet
            missing = row.layout.shard * (FP32 - row.widths.param)
        if setting.slots:
            pass  # packed in memory that is counted by itself, and nothing comes back to the device
        elif not plan.alone:
            packed, flight = 0 if setting.shared or row.unpacked else full, 2 * full * far // plan.size
        elif plan.step_in_backward:
            packed = full * (not row.unpacked)
        elif rounds == 1 and not leaves:
            missing = full  # gradients come to rest one after the other; elsewhere their memory stays from step to step
            packed = -full * row.unpacked  # it rests as it came
        elif rounds > 2 or row.widths.param == FP32 or leaves:
            # A further round is a tensor of its own, and so is one that leaves.
            packed = full * (rounds > 1 or not row.unpacked)
        if plan.leaves:
            missing = 0  # they come to rest in the other memory
        arrived, early = (elements * row.widths.param * row.trained for elements in (row.layout.used, row.early))
        whole = full if plan.params.sharded and not plan.once else 0
        leaving = row.layout.shard * row.widths.param * leaves
        missing *= row.trained
        average = row.layout.shard * row.widths.param * row.trained * (plan.step_in_backward and not plan.alone)
        found.append(Trip(row.unit, whole, arrived, early, packed, flight, missing, leaving, full > limit, average))
    return most(found)


def most_ahead(plan: Plan, sizes: Sequence[int]) -> int:
    """Of trained buckets of these bytes, the most that one may have to be averaged while the next is packed, not before.

    Where parameters rest sharded that is twice the median: waiting for an output layer costs less than holding it.
    """
    return 2 * sorted(sizes)[len(sizes) // 2] if plan.params.sharded and sizes else top(sizes)


def most(trips: Sequence[Trip]) -> Most:
    """The highest moment of a backward."""
    whole: dict[int, int] = {}
    for trip in trips:
        whole[trip.unit] = whole.get(trip.unit, 0) + trip.full
    units = sorted(set(whole) - {0})
    missing = sum(trip.missing for trip in trips)
    early = sum(trip.early for trip in trips)
    before, left, coming = 0, 0, 0  # the round before: slices, what leaves, what will leave once it is averaged
    moments = [Most(0, 0)]

    for trip in reversed(trips):  # the root's buckets are listed first, so they go out last
        at = units.index(trip.unit) if trip.unit else 0
        near = units[max(at - 1, 0) : at + 1] if trip.unit else []
        held = sum(whole.get(unit, 0) for unit in (0, *near))

        def look(flight: int, held: int = held, leaving: int = 0) -> None:
            moments.append(Most(held + min(flight, 0), max(flight, 0), leaving))

        look(early + before - missing, leaving=max(left, coming))  # its unit is reached
        if trip.arrived:
            early -= trip.early
            missing -= trip.missing
            gone = trip.flight + trip.average
            look(early + max(trip.arrived + trip.packed + trip.average, gone) + before - missing, leaving=max(left, coming))
            here = not trip.flight or trip.large  # averaged by now
            if trip.large:
                look(early + gone - missing, leaving=trip.leaving)
            left, coming = (trip.leaving, 0) if here else (coming, trip.leaving)
            before = 0 if here else gone
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
