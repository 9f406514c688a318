"""Updates inside the backward (step_in_backward=True): a bucket is updated once its average is there, so gradients do not rest.

    begin()         a backward begins: param groups are read, and are not to change until step()
    going(bucket)   its gradients go out: what scripts wrote is kept, and autograd learns that its values change from now on
    take(bucket)    its average is there: parameters that had a gradient on this rank are updated, the others wait
    end()           ranks have agreed on who has a gradient: the others are updated, and ranks wait for each other's updates

An average rests only for a parameter of which this rank does not know yet whether any other has a gradient. So every element is
updated once, from the same average, by the same pass as in step(): the same bits.

Why a rank may update what others hold too (they may share the memory that is written): all N slices are there, so on every
rank autograd has brought the gradients of these parameters, and so has run every node that saved them. What would still read
them raises: a saved tensor by autograd's version counter, a unit that is gathered again by `needs`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zerolite.bucket import Bucket
from zerolite.entry import DONE, Entry, Table
from zerolite.kernels import exceeds_
from zerolite.reducer import Reducer, grads_of
from zerolite.unit import Schedule, Unit
from zerolite.writes import targets


class Early:
    """The updates of one optimizer's backwards.

    check   raises what is wrong with parameters or param groups, before anything is updated
    groups  the param groups
    """

    def __init__(
        self,
        reducer: Reducer,
        schedule: Schedule,
        table: Table,
        check: Callable[[], None],
        groups: Callable[[], list[dict[str, Any]]],
    ) -> None:
        self.reducer, self.table = reducer, table
        self.check, self.groups = check, groups
        self.infinite: Tensor = torch.zeros_like(reducer.suspect)
        self.moved: set[Bucket] = set()  # gone out in this backward
        self.read: list[dict[str, Any]] = []  # options of the param groups as the backward found them
        reducer.going, reducer.take, reducer.bad = self.going, self.take, lambda: bool(self.infinite)
        schedule.needs = self.needs
        reducer.at_start.insert(0, self.begin)
        reducer.at_end.append(self.end)  # after Grads.complete

    # ---- the backward

    def begin(self) -> None:
        """Raises where the last backward had no step()."""
        if DONE in self.table.state:
            raise RuntimeError(
                "backward(): expected step() after the last one, which has updated parameters (step_in_backward=True), got a "
                "further backward(). Sum micro-batches under no_sync() but for the last one, and call step() after it."
            )
        with torch._C.DisableTorchFunctionSubclass():  # parameters of leaves that watch themselves are not used by this
            self.check()
        self.read = list(map(options, self.groups()))

    def going(self, bucket: Bucket) -> None:
        self.moved.add(bucket)
        with torch._C.DisableTorchFunctionSubclass():
            bucket.keep_writes()
            bucket.wrote([entry for entry in bucket.entries if entry.live])

    def needs(self, unit: Unit) -> None:
        """Raises where a backward would gather parameters that it has updated."""
        if self.moved.isdisjoint(unit.buckets) or unit.shown:
            return
        raise RuntimeError(
            f"unit '{unit.name}': expected every use of its parameters to come before their update in the backward "
            "(step_in_backward=True), got one after it. Checkpoint with use_reentrant=False, use parameters without detach(), "
            "or build the ZeroOptimizer without step_in_backward."
        )

    def take(self, bucket: Bucket) -> None:
        grads = grads_of(bucket)
        grads.finish()
        average = grads.average.settled()
        here = [entry for entry in bucket.entries if entry.live]
        if average is None or not here or grads.waiting:  # waiting: Reducer.union will say what is wrong
            return
        exceeds_(self.infinite, average, float("inf"))
        self._update(bucket, here)

    def _update(self, bucket: Bucket, entries: list[Entry]) -> None:
        with torch.no_grad():
            bucket.prepare(targets(bucket, entries))()
        bucket.comm.ledger.note("update", bucket.name)
        for entry in entries:
            entry.state = DONE
        if all(entry.state == DONE for entry in bucket.entries):
            self._free(bucket)

    def _free(self, bucket: Bucket) -> None:
        grads_of(bucket).clear()
        grads_of(bucket).average.clear(False)

    def end(self) -> None:
        moved, self.moved = self.moved, set()
        if not moved:  # under no_sync()
            return
        for bucket in self.reducer.order if not self.reducer.open else []:  # else some begin to train: step() does the rest
            self.take(bucket)
            self._free(bucket)
        for row, state in enumerate(self.table.state):
            self.table.steps[row] += state == DONE and self.table.groups[row] is not None
        updated = {bucket: [entry for entry in bucket.entries if entry.state == DONE] for bucket in self.reducer.order}
        for bucket, entries in updated.items():
            if entries:
                bucket.wrote(entries)
                bucket.publish()
        for bucket in updated:
            bucket.finish_publish()
        self.reducer.suspect.zero_()
        self.reducer.version += 1

    # ---- step and zero_grad

    def left(self, present: list[bool]) -> list[bool]:
        """Of what takes part in a step, what no backward has updated. Raises RuntimeError where param groups changed since."""
        if DONE not in self.table.state:
            return present
        now = list(map(options, self.groups()))
        if now != self.read:
            pairs = [(old, new) for old, new in zip(self.read, now, strict=False) if old != new]
            names = ", ".join(name for old, new in pairs[:1] for name in new if old.get(name) != new[name])
            raise RuntimeError(
                f"step(): expected param groups as the backward found them, got others ({names or 'a new group'}). With "
                "step_in_backward=True the update is made by then: change them before backward(), or after step()."
            )
        return [found and state != DONE for found, state in zip(present, self.table.state, strict=True)]

    def clear(self) -> None:
        """zero_grad. Raises RuntimeError where step() was left out, but for a step that failed."""
        failed = bool(self.infinite)
        if DONE in self.table.state and not failed:
            raise RuntimeError(
                "zero_grad(): expected after step(), got between backward() and step(), where with step_in_backward=True the "
                "update is made already. Call step() first."
            )
        self.infinite.zero_()
        self.moved.clear()


def options(group: dict[str, Any]) -> dict[str, Any]:
    """A param group's options, as numbers where they are tensors."""
    found = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in found.items()}
