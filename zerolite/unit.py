"""Units: modules whose parameters are whole only while they are in use, where parameters rest sharded.

    forward     enter -> gather my buckets, prefetch the unit that followed last time -> run -> leave: release
    backward    done of the unit after me (its inputs' gradients exist, its parameters' gradients are collected): release
                -> reach (a gradient enters one of my outputs) -> gather, prefetch the unit before me

So two units are whole at once. The root unit (what belongs to no other unit) stays whole from the forward to the end of
the backward. A leaf (an embedding, a head) comes and goes like a block. Others may read a block's parameters only while it
runs, but a leaf's have always been there for all of the model (`F.linear(x, embed.weight)`), so they watch themselves
(pending.py): the first use outside of the leaf's own forward makes it whole, and from then on it stays like the root.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from zerolite.bucket import Bucket
from zerolite.pending import mark, unmark
from zerolite.writes import take_replaced

_level = torch._C._functorch.maybe_current_level  # of torch.func's transforms
log = logging.getLogger("zerolite")


class Run(Protocol):
    """A forward call of a unit, as the backward sees it."""

    def over(self, task: int) -> bool: ...

    def end(self) -> None: ...


class Unit:
    """Buckets that are gathered and released together."""

    name: str
    buckets: list[Bucket]
    is_root: bool  # stays whole: the root, and leaves whose parameters others read
    is_leaf: bool  # a module of the root that is a unit as long as nobody else reads its parameters
    reached: bool  # the backward needs it now
    inputs: int  # forward calls reached by the backward whose inputs' gradients are not there yet
    before: int  # gradients that its buckets had collected before this backward
    calls: list[list[tuple[Tensor, Any]]]  # forward calls under way: the inputs that require a gradient, and their nodes
    runs: weakref.WeakSet[Run]  # forward calls whose graph is there

    def __init__(self, name: str, buckets: list[Bucket], is_root: bool, is_leaf: bool = False) -> None:
        self.name = name
        self.buckets = buckets
        self.is_root = is_root
        self.is_leaf = is_leaf
        self.calls = []
        self.runs = weakref.WeakSet()
        self.before = 0
        self.forget()

    def forget(self) -> None:
        """No backward needs the unit."""
        self.reached = False
        self.inputs = 0
        self.before = self.came
        self.calls.clear()
        for run in self.runs:
            run.end()

    @property
    def came(self) -> int:
        """Counts gradients that were collected, from the start."""
        return sum(bucket.grads.came for bucket in self.buckets if bucket.grads is not None)

    @property
    def expected(self) -> int:
        """Gradients that a backward through all of the unit collects."""
        return sum(entry.param.requires_grad for bucket in self.buckets for entry in bucket.entries)

    def over(self, task: int) -> bool:
        """Whether a backward has come through every forward call, so that no more gradients come."""
        return self.reached and not self.is_root and all(run.over(task) for run in self.runs)

    @property
    def shown(self) -> bool:
        """Whether the parameters are whole and visible."""
        return all(bucket.whole and bucket.pending is None for bucket in self.buckets)

    def gather(self) -> None:
        for bucket in self.buckets:
            bucket.gather()

    def ready(self) -> None:
        self.unwatch()
        for bucket in self.buckets:
            bucket.gather()
        for bucket in self.buckets:
            bucket.ready()

    def release(self) -> None:
        self.unwatch()
        for bucket in self.buckets:
            bucket.release()

    def watch(self, call: Callable[[], None]) -> None:
        """call() before anyone uses a parameter of a leaf, until it is whole or `unwatch`."""
        if self.is_leaf and not self.shown and not mark((p for bucket in self.buckets for p in bucket.params), call):
            call()  # a parameter was given a class of its own, which may not be changed

    def unwatch(self) -> None:
        if self.is_leaf:
            unmark(p for bucket in self.buckets for p in bucket.params)


class Schedule:
    """The order of units, learnt from the last forward, and what is prefetched."""

    units: list[Unit]
    order: list[Unit]  # units in the order of their first use in the last complete forward
    seen: list[Unit]  # the same for the forward under way
    borrowed: list[Unit]  # gathered for someone who reads or writes parameters outside of a forward
    held: bool  # inside full_params(): nothing is released
    open: bool  # units are in use: leaves that are released watch themselves
    pinned: bool  # a backward with create_graph: what it needs again stays whole until the step
    entered: list[Unit]  # units that this backward has reached and not released
    in_backward: Callable[[], bool]
    begin_backward: Callable[[], None]
    send: Callable[[list[Bucket]], None]  # no more gradients of these come in this backward
    leaving: Callable[[list[Bucket]], None]  # buckets are about to be released
    needs: Callable[[Unit], None]  # a forward is about to use a unit, perhaps inside of a backward

    def __init__(
        self,
        units: list[Unit],
        in_backward: Callable[[], bool],
        begin_backward: Callable[[], None],
        send: Callable[[list[Bucket]], None],
    ) -> None:
        self.units = units
        self.in_backward = in_backward
        self.begin_backward = begin_backward
        self.send = send
        self.needs = lambda unit: None
        self.leaving = lambda buckets: None
        self.entered = []
        self.order = []
        self.seen = []
        self.borrowed = []
        self.held = self.pinned = self.open = False

    def _release(self, unit: Unit) -> None:
        if not (self.held or self.pinned):
            self.leaving(unit.buckets)
            unit.release()
            self._watch(unit)

    def _watch(self, unit: Unit) -> None:
        if self.open:
            unit.watch(functools.partial(self.read, unit))

    def read(self, leaf: Unit) -> None:
        """Someone uses a leaf's parameters outside of its forward (every rank does): they stay, as the root's do."""
        if not leaf.is_root:
            log.warning(
                "zerolite: parameters of '%s' are used outside of its forward: they stay whole (%d bytes) from the forward to "
                "the end of the backward.",
                leaf.name,
                sum(bucket.full.numel() * bucket.full.element_size() for bucket in leaf.buckets),
            )
        leaf.is_root = True
        leaf.ready()

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
                take_replaced(bucket)
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
        if _level() is not None and not self.held:
            raise RuntimeError(
                f"unit '{unit.name}': expected a forward outside of torch.func's transforms (grad, vjp, vmap, ...), got one "
                "inside, where stage 3 cannot gather parameters. Put it inside `with optimizer.full_params():`."
            )
        if unit not in self.seen:
            self.seen.append(unit)
        if not self.open:
            self.open = True
            for leaf in self.units:
                self._watch(leaf)
        if self.in_backward():  # a recomputation, whose graph may be a backward of its own
            self._send_over(unit)
        self.needs(unit)
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

    def backward(self) -> None:
        """A backward begins: what was collected before it does not count."""
        for unit in self.units:
            unit.before = unit.came

    def reach(self, unit: Unit, has_inputs: bool) -> None:
        """The backward enters `unit`."""
        self.begin_backward()
        self._send_over(unit)
        self.pinned = self.pinned or torch.is_grad_enabled()  # create_graph=True: a double backward needs weights again
        unit.reached = True
        unit.inputs += has_inputs
        for other in self.units if unit.is_root else (unit,):
            if other is unit or other.is_root:
                other.ready()
        self._prefetch(unit, -1)

    def _send_over(self, next_one: Unit) -> None:
        """Units that the backward has come through, but whose parameters were not all used on this rank (an expert without a
        token), send what there is before `next_one` is gathered. Ranks that used all of them have sent by now, so on every
        rank the same collectives follow one another. They are released where no input's gradient is to come: until then
        something of them might be needed."""
        task = torch._C._current_graph_task_id()
        self.entered = [unit for unit in self.entered if unit.reached]
        for unit in self.entered:
            if unit.over(task):
                self.send([bucket for bucket in unit.buckets if bucket.grads is not None])
                if unit.inputs == 0:
                    self._release(unit)
                    unit.forget()
        if next_one not in self.entered:
            self.entered.append(next_one)

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
        self.open = False
        for unit in self.units:
            unit.unwatch()
            self._release(unit)
            unit.forget()
        self.borrowed = []
        self.entered = []

    def borrow(self, units: list[Unit]) -> None:
        """Makes a few units whole for a reader outside of forward and backward; others that were go back."""
        self.give_back(keep=units)
        for unit in units:
            unit.ready()
        self.borrowed = units

    def give_back(self, keep: Sequence[Unit] = ()) -> None:
        """Releases what was borrowed; values written to it are kept."""
        for unit in self.borrowed:
            if unit not in keep:
                self._release(unit)
        self.borrowed = []
