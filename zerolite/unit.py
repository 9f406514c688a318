"""Units: modules whose parameters are whole only while they are in use, where parameters rest sharded.

    forward     enter -> gather my buckets, prefetch the unit that followed last time -> run -> leave: release
    backward    reach (a gradient enters one of my outputs) -> gather, prefetch the unit before me
                -> done (my inputs' gradients exist, my parameters' gradients are collected): release

The root unit (what belongs to no other unit) stays whole from the forward to the end of the backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zerolite.bucket import Bucket


class Unit:
    """Buckets that are gathered and released together."""

    name: str
    buckets: list[Bucket]
    is_root: bool
    reached: bool  # the backward needs it now
    inputs: int  # forward calls reached by the backward whose inputs' gradients are not there yet
    before: int  # gradients that its buckets had collected before this backward
    calls: list[list[Tensor]]  # forward calls under way: the inputs that require a gradient

    def __init__(self, name: str, buckets: list[Bucket], is_root: bool) -> None:
        self.name = name
        self.buckets = buckets
        self.is_root = is_root
        self.calls = []
        self.before = 0
        self.forget()

    def forget(self) -> None:
        """No backward needs the unit."""
        self.reached = False
        self.inputs = 0
        self.before = self.came
        self.calls.clear()

    @property
    def came(self) -> int:
        """Counts gradients that were collected, from the start."""
        return sum(bucket.grads.came for bucket in self.buckets if bucket.grads is not None)

    @property
    def expected(self) -> int:
        """Gradients that a backward through all of the unit collects."""
        return sum(entry.param.requires_grad for bucket in self.buckets for entry in bucket.entries)

    @property
    def shown(self) -> bool:
        """Whether the parameters are whole and visible."""
        return all(bucket.whole and bucket.pending is None for bucket in self.buckets)

    def gather(self) -> None:
        for bucket in self.buckets:
            bucket.gather()

    def ready(self) -> None:
        for bucket in self.buckets:
            bucket.gather()
        for bucket in self.buckets:
            bucket.ready()

    def release(self) -> None:
        for bucket in self.buckets:
            bucket.release()


class Schedule:
    """The order of units, learnt from the last forward, and what is prefetched."""

    units: list[Unit]
    order: list[Unit]  # units in the order of their first use in the last complete forward
    seen: list[Unit]  # the same for the forward under way
    borrowed: Unit | None  # gathered for someone who reads or writes parameters outside of a forward
    held: bool  # inside full_params(): nothing is released
    pinned: bool  # a backward with create_graph: what it needs again stays whole until the step
    in_backward: Callable[[], bool]
    begin_backward: Callable[[], None]

    def __init__(self, units: list[Unit], in_backward: Callable[[], bool], begin_backward: Callable[[], None]) -> None:
        self.units = units
        self.in_backward = in_backward
        self.begin_backward = begin_backward
        self.order = []
        self.seen = []
        self.borrowed = None
        self.held = self.pinned = False

    def _release(self, unit: Unit) -> None:
        if not (self.held or self.pinned):
            unit.release()

    def unpin(self) -> None:
        """A step comes: whatever was kept for a further backward goes."""
        self.pinned = False
        self.release_all()

    def hold(self) -> None:
        """Makes everything whole until let_go()."""
        self.give_back()
        for unit in self.units:
            unit.gather()
        for unit in self.units:
            unit.ready()
        self.held = True

    def let_go(self) -> None:
        """Releases everything; what every rank wrote to the parameters meanwhile is kept, however it was written."""
        self.held = False
        for unit in self.units:
            for bucket in unit.buckets:
                bucket.keep_writes(quiet=True, everywhere=True)
        self.release_all()

    def begin(self) -> None:
        """A forward of the whole model starts (a recomputation inside a backward changes nothing)."""
        if self.in_backward():
            return
        self.give_back()
        self.seen = []
        for unit in self.units:
            unit.forget()

    def enter(self, unit: Unit) -> None:
        """The forward needs `unit` now."""
        if unit not in self.seen:
            self.seen.append(unit)
        unit.ready()
        if not unit.reached:
            self._prefetch(unit, -1 if self.in_backward() else 1)

    def ensure(self, unit: Unit) -> None:
        """A part of `unit` runs, perhaps without the unit's own forward."""
        if not unit.shown:
            self.enter(unit)

    def _prefetch(self, unit: Unit, step: int) -> None:
        if unit not in self.order:
            return
        position = self.order.index(unit) + step
        if 0 <= position < len(self.order):
            self.order[position].gather()

    def leave(self, unit: Unit, grad: bool) -> None:
        """The forward has left `unit`; the last one is kept for the backward that follows."""
        if unit.reached or unit.is_root:
            return
        if grad and self.order and unit is self.order[-1]:
            return
        self._release(unit)

    def end(self, grad: bool) -> None:
        """The forward of the whole model is over."""
        if self.in_backward():
            return
        self.order = list(self.seen)
        if not grad:
            self.release_all()

    def reach(self, unit: Unit, has_inputs: bool) -> None:
        """The backward enters `unit`."""
        self.begin_backward()
        self.pinned = self.pinned or torch.is_grad_enabled()  # create_graph=True: a double backward needs weights again
        unit.reached = True
        unit.inputs += has_inputs
        unit.ready()
        self._prefetch(unit, -1)

    def passed(self, unit: Unit) -> None:
        """The gradients of one call's inputs exist."""
        unit.inputs = max(unit.inputs - 1, 0)
        self._done(unit)

    def collected(self, unit: Unit) -> None:
        """Gradients of the unit were collected."""
        self._done(unit)

    def _done(self, unit: Unit) -> None:
        if unit.reached and not unit.is_root and unit.inputs == 0 and unit.came - unit.before >= unit.expected:
            self._release(unit)
            unit.forget()

    def release_all(self) -> None:
        """Nothing is in use: the end of a backward, of a forward without gradients, or a step."""
        for unit in self.units:
            self._release(unit)
            unit.forget()
        self.borrowed = None

    def borrow(self, unit: Unit) -> None:
        """Makes one unit whole for a reader outside of forward and backward; the one before it goes back."""
        if self.borrowed is unit:
            return
        self.give_back()
        unit.ready()
        self.borrowed = unit

    def give_back(self) -> None:
        """Releases the borrowed unit; values written to it are kept."""
        if self.borrowed is not None:
            self._release(self.borrowed)
            self.borrowed = None
