"""Updates inside the backward (step_in_backward=True): a bucket is updated once its average is there, so gradients do not rest.

    begin()         a backward begins: param groups are read, and are not to change until step()
    going(bucket)   its gradients go out: what scripts wrote is kept, and autograd learns that its values change from now on
    take(bucket)    its average is there: parameters that had a gradient on this rank are updated, the others wait
    end()           ranks have agreed on who has a gradient: the others are updated, and ranks wait for each other's updates

An average rests only for a parameter of which this rank does not know yet whether any other has a gradient. So every element is
updated once, from the same average, by the same pass as in step(): the same bits.

Why a rank may update what others hold too (they may share the memory that is written): all N slices are there, so on every
rank autograd has brought the gradients of these parameters, and so has run every node that saved them. What would still read
them raises: a saved tensor by autograd's version counter, a unit that is gathered again for a recomputation by `needs`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from zerolite.bucket import Bucket
from zerolite.build import Built
from zerolite.entry import DONE, Entry
from zerolite.kernels import exceeds_
from zerolite.reducer import Reducer, grads_of
from zerolite.unit import Schedule, Unit
from zerolite.writes import targets


class Early:
    """The updates of one optimizer's backwards.

    check   raises what is wrong with parameters or param groups, before anything is updated
    groups  the param groups; None: the optimizer is gone, and nothing is updated any more
    """

    def __init__(
        self,
        reducer: Reducer,
        schedule: Schedule,
        entries: list[Entry],
        check: Callable[[], None],
        groups: Callable[[], list[dict[str, Any]] | None],
    ) -> None:
        self.reducer, self.schedule = reducer, schedule
        self.entries, self.table = entries, entries[0].table
        self.check, self.groups = check, groups
        self.infinite: Tensor = torch.zeros_like(reducer.suspect)
        self.moved: dict[Bucket, bool] = {}  # gone out in this backward, and whether its average was looked at
        self.late: set[int] = set()  # rows of parameters that no backward has trained before this one
        self.broken = False  # a backward is under way, or has failed
        self.read: list[dict[str, Any]] | None = []  # options of the param groups as the backward found them
        reducer.going, reducer.take, reducer.tell = self.going, self.take, self.tell
        schedule.needs, schedule.leaving = self.needs, self.unwritten
        reducer.at_start.insert(0, self.begin)
        reducer.at_end.append(self.end)  # after Grads.complete

    @property
    def updated(self) -> bool:
        """Whether a backward has updated something, and step() is still to come."""
        return DONE in self.table.state

    # ---- the backward

    def begin(self) -> None:
        """Raises where the last backward had no step()."""
        groups = self.groups()
        self.read = None if groups is None else list(map(options, groups))
        if self.read is None:
            return
        if self.schedule.held:
            raise RuntimeError(
                "backward(): expected outside of `with optimizer.full_params()`, got inside, where with step_in_backward=True "
                "its updates would be overwritten as the block ends. Leave the block first."
            )
        if self.updated and self.broken:
            raise RuntimeError(f"backward(): {FAILED}")
        if self.updated:
            raise RuntimeError(
                "backward(): expected step() after the last one, which has updated parameters (step_in_backward=True), got a "
                "further backward(). Sum micro-batches under no_sync() but for the last one, call step() after it, and "
                "checkpoint with use_reentrant=False (others are backwards of their own)."
            )
        self.check()
        self.broken = True
        self.late = {entry.index for entry in self.entries if entry.handle is None}
        self.moved = {}
        self.infinite.zero_()

    def going(self, bucket: Bucket) -> None:
        trained = [entry for entry in bucket.entries if entry.param.requires_grad]  # on whichever rank it has a gradient
        if trained and self.read is not None:
            self.moved[bucket] = False
            with torch._C.DisableTorchFunctionSubclass():  # leaves that watch themselves are not used by this
                bucket.keep_writes()
                if self.reducer.task in map(
                    self.table.state.__getitem__, bucket.rows
                ):  # else end() tells, if others update it:
                    bucket.wrote(trained)  # torch.autograd.grad brings none, and its graph may be used again

    def needs(self, unit: Unit) -> None:
        """Raises where a recomputation would gather parameters that its backward has updated. (Where a backward comes to a unit
        again, for frozen parameters of it, saved tensors tell.)"""
        if self.reducer.active and not unit.shown and any(bucket in self.moved for bucket in unit.buckets):
            raise RuntimeError(
                f"unit '{unit.name}': expected every use of its parameters to come before their update in the backward "
                "(step_in_backward=True), got one after it. Checkpoint with use_reentrant=False, use parameters without "
                "detach(), or build the ZeroOptimizer without step_in_backward."
            )

    def unwritten(self, buckets: list[Bucket]) -> None:
        """Raises where a script wrote to parameters after their gradients had gone out: old values would replace new ones."""
        for bucket in buckets:
            slots = bucket.written() if bucket in self.moved else []
            if slots:
                raise RuntimeError(
                    f"parameter '{bucket.entries[slots[0]].name}': written inside of a backward (by a hook) that updates it "
                    "(step_in_backward=True). Write before backward(), or after step()."
                )

    def take(self, bucket: Bucket) -> None:
        """Updates what this backward has brought here."""
        grads_of(bucket).finish()
        average = grads_of(bucket).average.settled()
        if average is None or bucket not in self.moved:
            return
        if not self.moved[bucket]:
            self.moved[bucket] = True
            exceeds_(self.infinite, average, float("inf"))
        self._update(bucket, average, [entry for entry in bucket.entries if entry.state == self.reducer.task])

    def _update(self, bucket: Bucket, average: Tensor, entries: list[Entry]) -> None:
        if entries:
            assert bucket.state is not None
            if bucket.home is not None and bucket.mine is not bucket.shard:
                bucket.mine = bucket.shard.copy_(bucket.mine)
            with torch.no_grad():
                bucket.state.prepare(targets(bucket, entries))(bucket.mine, bucket.rest, [average], 1.0)
            bucket.comm.ledger.note("update", bucket.name)
            for entry in entries:
                entry.state = DONE
        if all(entry.state == DONE for entry in bucket.entries):
            self._free(bucket)

    def _free(self, bucket: Bucket) -> None:
        grads_of(bucket).clear()
        grads_of(bucket).average.clear(False)

    def tell(self) -> list[bool]:
        """For all ranks: whether something was not finite, and whether any gradient came."""
        state = self.table.state
        return [bool(self.infinite), DONE in state or self.reducer.task in state]

    def end(self) -> None:
        if self.read is None or not self.moved or not self.reducer.told[1]:  # gone, under no_sync(), torch.autograd.grad
            self.broken, self.moved = False, {}
            return
        self.unwritten(list(self.moved))
        for bucket in self.moved:
            average = grads_of(bucket).average.settled()
            if average is not None:
                self._update(bucket, average, [e for e in bucket.entries if e.live and e.index not in self.late])
            if not any(entry.live for entry in bucket.entries):  # what begins to train goes out, and is updated, in step()
                self._free(bucket)
        for row, state in enumerate(self.table.state):
            self.table.steps[row] += state == DONE and self.table.groups[row] is not None
        updated = {bucket: [entry for entry in bucket.entries if entry.state == DONE] for bucket in self.reducer.order}
        for bucket, entries in updated.items():
            if entries:
                bucket.wrote(entries)
                bucket.stale = bucket.stale or (bucket.home is not None and bucket.home.dirty())  # p.data of a hook: dropped
                bucket.publish()
        for bucket in updated:
            bucket.finish_publish()
        if not any(entry.live for entry in self.entries):
            self.reducer.suspect.zero_()
        self.reducer.version += 1
        self.broken, self.moved = False, {}

    # ---- between backward and step

    def left(self, present: list[bool]) -> list[bool]:
        """Of what takes part in a step, what no backward has updated. Raises RuntimeError where param groups changed since."""
        if not self.updated:
            return present
        if self.broken:
            raise RuntimeError(f"step(): {FAILED}")
        pairs = zip(self.read or [], map(options, self.groups() or []), strict=False)  # what is new was not read
        names = dict.fromkeys(name for old, new in pairs for name in old if name in new and old[name] != new[name])
        if names:
            raise RuntimeError(
                f"step(): expected param groups as the backward found them, got another {', '.join(names)}. With "
                "step_in_backward=True the update is made by then: change them before backward(), or after step()."
            )
        return [found and state != DONE for found, state in zip(present, self.table.state, strict=True)]

    def refuse(self, what: str) -> None:
        """Raises where `what` would come between a backward's updates and their step()."""
        if self.updated and not self.broken:
            raise RuntimeError(
                f"{what}: expected after step(), got between backward() and step(), where with step_in_backward=True the "
                "update is made already. Call step() first."
            )

    def skip(self) -> None:
        """A step is to be skipped. Raises FloatingPointError where a backward has made a part of it."""
        if self.updated:
            self.broken = True
            raise FloatingPointError(f"step(): a gradient of what begins to train is not finite: {FAILED}")

    def clear(self) -> None:
        """zero_grad. Raises RuntimeError where step() was left out; warns where a backward that failed had updated some."""
        self.refuse("zero_grad()")
        if self.updated:
            warnings.warn(
                "zerolite: a backward that failed had updated a part of the parameters (step_in_backward=True). They are "
                "between two steps until a checkpoint is loaded.",
                stacklevel=4,
            )
        self.infinite.zero_()
        self.broken, self.moved = False, {}


FAILED = (
    "expected after a backward that went through, got after one that failed and had updated a part of the parameters "
    "(step_in_backward=True). Load a checkpoint, call optimizer.zero_grad(), and go on."
)


def options(group: dict[str, Any]) -> dict[str, Any]:
    """A param group's options, as numbers where they are tensors."""
    found = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    return {name: tree_map_only(Tensor, Tensor.tolist, value) for name, value in found.items()}


def early_of(built: Built, check: Callable[[], None], groups: Callable[[], list[dict[str, Any]] | None]) -> Early | None:
    """Connects what was built with updates in its backwards, where its plan says so."""
    if built.schedule is None or not built.plan.step_in_backward:
        return None
    return Early(built.reducer, built.schedule, built.entries, check, groups)
