"""Gradients as the training loop sees them: what `p.grad` means before, at and after a step."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import compress, repeat
from operator import and_, attrgetter, is_, is_not, not_

import torch
from torch import Tensor

from zerolite.entry import DONE, HELD, NONE, USED, Entry
from zerolite.lazy_grad import LazyGrad, check
from zerolite.norm import gradient_norms
from zerolite.reducer import History, Reducer, grads_of
from zerolite.views import Views, owned

_strided = torch.strided
_grad, _row = attrgetter("grad"), attrgetter("row")
_place = attrgetter("device", "dtype")
_nothing: deque[None] = deque(maxlen=0)  # its extend() runs an iterator to its end
_UNSHARED = next(map(sys.getrefcount, [object()]))  # references to what only a list holds, in such a loop


class Grads:
    """Connects autograd and the handles in p.grad with the reducer.

    A parameter takes part in a step where its p.grad is not None on any rank, as in torch: a handle stands for
    what was collected, a plain tensor that the user assigned replaces it, and None drops it.
    """

    reducer: Reducer
    entries: list[Entry]
    on_collected: Callable[[Entry], None] | None
    adopt: Callable[[list[Entry]], None]  # gives states and handles to parameters that had none

    def __init__(
        self,
        reducer: Reducer,
        entries: list[Entry],
        on_collected: Callable[[Entry], None] | None,
        adopt: Callable[[list[Entry]], None],
    ) -> None:
        self.reducer = reducer
        self.entries = entries
        self.on_collected = on_collected
        self.adopt = adopt
        reducer.at_start.append(self.fold)
        reducer.at_end.append(self.complete)
        self._norms: tuple[tuple[int, int], dict[float, list[float]]] = ((-1, 0), {})
        self.table = entries[0].table
        self._ours: list[bool] = []  # which parameters had a p.grad on this rank when the step began
        self._history = History()
        self.written: dict[int, Tensor] = {}  # by row, what ops have written through handles
        self.incoming: dict[int, Tensor] = {}  # by row, what autograd has added to handles, for the hook that follows
        self.views = Views()

    def make_handle(self, entry: Entry) -> None:
        """The handle of one parameter; fp16 shows fp32 (GradScaler refuses to unscale fp16 gradients)."""
        dtype = entry.param.dtype
        if dtype == torch.float16:
            dtype = torch.float32
            entry.param.grad_dtype = None
        entry.handle = LazyGrad(entry, self, dtype)

    def _untouched(self) -> bool:
        """Whether every p.grad is its own handle (None where there is none)."""
        self.views.settle()
        return all(map(is_, map(_grad, self.table.params), self.table.handles))

    # ---- backward

    def fold(self) -> None:
        """A backward begins after others: what was set to None since is dropped, and what was clipped or unscaled keeps its
        factor. (A tensor that was assigned stays: autograd adds to it.)"""
        self.views.settle()
        if self.table.state.count(NONE) < len(self.entries):
            with torch._C.DisableTorchFunctionSubclass():  # p.grad of a parameter that waits for its value
                now = list(map(_grad, self.table.params))
            for entry in compress(self.entries, map(is_, now, repeat(None))):
                if entry.live:
                    self.drop(entry)
            self._renew(list(map(is_not, now, self.table.handles)))  # autograd may have written the first one already
            if max(self.table.state) < 0:  # nothing is left, as after zero_grad()
                self._reset()
        if self.table.plain:
            return
        scaled = [entry for entry in self.entries if entry.factor != 1.0 and entry.live]
        if scaled:
            self.reducer.flush()
            self.reducer.version += 1
            self._history.scaled.append((self._history.rounds, self.table.mark))
        for entry in scaled:
            grads_of(entry.bucket).multiply(entry.slot, entry.factor)
        self.table.factors[:] = [1.0] * len(self.entries)

    def complete(self) -> None:
        """A backward is over: every parameter with a gradient on any rank carries a handle on all (a collective).

        So clipping sees the same parameters everywhere. Parameters that were frozen until now are adopted.
        """
        if not self.reducer.sync:
            return
        params, state = self.table.params, self.table.state
        everything = state.count(self.reducer.task) == len(state)  # came in this backward
        ours = [True] * len(state) if everything else list(map(is_not, map(_grad, params), repeat(None)))
        present = self.reducer.union(ours, "step backward")
        self._history.rounds += 1
        late: list[Entry] = []
        if self.table.trained < len(self.entries):
            late = [e for e in self.entries if e.handle is None and present[e.index]]
        if late:
            self.adopt(late)
            self.reducer.open = True  # on ranks that do not use them too
        for entry in self.entries if late or present is not ours else []:
            if not present[entry.index]:
                continue
            grad = entry.param.grad
            if grad is None:
                entry.state, entry.factor = HELD, 1.0
                entry.param.grad = entry.handle
            elif not isinstance(grad, LazyGrad) and entry in late:
                self.assign(entry, grad)

    def arrive(self, entry: Entry, param: Tensor) -> None:
        """Autograd has written p.grad, or added to the handle in it."""
        grad = param.grad
        if entry.live or type(grad) is not Tensor:
            grad = self._again(entry, grad)
        if grad is None:
            return
        if grad.requires_grad or grad.layout is not _strided:
            raise _unfit(entry, grad)
        self.reducer.collect(entry, grad)
        param.grad = entry.handle
        if self.on_collected is not None:
            self.on_collected(entry)

    def filled(self, entry: Entry) -> None:
        """Hooks have done as `arrive` for parameters of the same bucket, and the round is complete."""
        assert entry.bucket is not None
        self.reducer.filled(entry.bucket)
        if self.on_collected is not None:
            self.on_collected(entry)

    def _again(self, entry: Entry, grad: Tensor | None) -> Tensor | None:
        """What autograd has added, where p.grad held something, or what was collected before was taken out of it."""
        if isinstance(grad, LazyGrad):
            if grad is not entry.handle:
                raise RuntimeError(_foreign(entry))
            if entry.consumed:
                self.incoming.pop(entry.index, None)
                raise RuntimeError(_used_up(entry))
            grad = self.incoming.pop(entry.index, None)
            grad = None if grad is None else owned(grad)
        elif grad is not None:
            if entry.live:
                self.drop(entry)  # p.grad was set to None in between (model.zero_grad())
                self._renew(map(entry.index.__eq__, range(len(self.entries))))
            entry.factor = 1.0
        return grad

    # ---- what handles ask (lazy_grad.Source)

    def norm_tensor(self, entry: Entry, order: float) -> Tensor:
        """The norm of one parameter's gradient, with its factor, in fp32 on its device; made for all at once."""
        return torch.tensor(self._scaled([entry.index], order)[0], dtype=torch.float32, device=entry.param.device)

    def _scaled(self, rows: Sequence[int], order: float) -> list[float]:
        """Norms with factors."""
        norms, factors = self.norms(order), self.table.factors
        return [norms[row] * abs(factors[row]) for row in rows] if order != 0.0 else [norms[row] for row in rows]

    def _rows(self, handles: list[LazyGrad]) -> Sequence[int] | None:
        """The rows of handles that all are their parameter's own, of gradients that nothing has replaced and no step has used
        up, on one device; None where they are not, or inside of a backward."""
        known, state = self.table.handles, self.table.state
        self.views.settle()
        if self.reducer.active or self.written or self.views or len({bucket.full.device for bucket in self.reducer.order}) > 1:
            return None
        rows: Sequence[int] = range(len(known))
        if len(handles) != len(known) or not all(map(is_, handles, known)):
            rows = list(map(_row, handles))
            if max(rows) >= len(known) or not all(map(is_, map(known.__getitem__, rows), handles)):
                return None
        if min(map(state.__getitem__, rows), default=0) <= USED or self.incoming:
            return None
        return rows

    def norm_tensors(self, handles: list[LazyGrad], order: float) -> list[Tensor] | None:
        """norm_tensor of each, if that is all that is to be done."""
        rows = self._rows(handles)
        if rows is None:
            return None
        return list(torch.tensor(self._scaled(rows, order), dtype=torch.float32, device=handles[0].device).unbind())

    def scale_all(self, handles: list[LazyGrad], by: object) -> bool:
        """Records a factor of each gradient, if `by` is a number or a tensor of one; whether it did."""
        if not (type(by) is float or (type(by) is Tensor and by.dim() == 0)) or (rows := self._rows(handles)) is None:
            return False
        factor, factors = float(by), self.table.factors
        for row in rows:
            factors[row] *= factor
        return True

    def clip(self, params: list[Tensor], max_norm: float, order: float) -> Tensor | None:
        """torch.nn.utils.clip_grad_norm_ with the same bits, without a call for each parameter; None: for torch to do."""
        table = self.table
        known = list(map(table.numbers.get, map(id, params)))
        if self.reducer.active or None in known or min(table.state) <= USED or not self._untouched() or self.views:
            return None
        rows = [row for row in known if row is not None and table.handles[row] is not None]
        if not rows or len(set(map(_place, map(table.params.__getitem__, rows)))) != 1:
            return None  # torch sums norms by device and dtype
        norms = torch.tensor(self._scaled(rows, order), dtype=torch.float32, device=table.params[rows[0]].device)
        total = torch.linalg.vector_norm(norms, order)
        by = float(torch.clamp(float(max_norm) / (total + 1e-6), max=1.0))
        for row in rows:
            table.factors[row] *= by
        return total

    def norms(self, order: float) -> list[float]:
        """Norm of each averaged gradient, without factors; all parameters' norms are computed at once."""
        moment, known = self._norms
        if moment != self.reducer.moment:
            known = {}
        if order not in known:
            known[order] = gradient_norms(self.reducer, self.entries, order)
            self._norms = (self.reducer.moment, known)
        return known[order]

    def finite(self, bad: bool = False) -> bool:
        """Whether all averaged gradients are finite, and no rank has a `bad` one beside: on every rank alike (a collective)."""
        self.reducer.settle("norm agreement")
        found = self.reducer.suspect.new_tensor([int(self.reducer.suspect), bad])
        self.reducer.comm.max_(found, "norm finite")
        self.reducer.suspect.copy_(found[:1])
        return self.reducer.finite() and not bool(found[1])

    def read(self, entry: Entry) -> Tensor:
        """The averaged gradient with its factors, whole (a collective). Shape of the parameter, the handle's dtype."""
        assert entry.bucket is not None and isinstance(entry.handle, LazyGrad)
        check(entry.handle)
        self.reducer.settle(f"read {entry.name}")
        full = entry.bucket.whole_gradient()
        grads_of(entry.bucket).average.coming.sync()
        value = grads_of(entry.bucket).view(full, entry.slot)
        value = value.float() * entry.factor if entry.factor != 1.0 else value.clone()  # not the average itself
        return value.to(entry.handle.device, entry.handle.dtype)

    def zero(self, entry: Entry) -> None:
        """p.grad becomes zeros, which still takes part in the next step."""
        task = entry.state
        if task == DONE:
            check(entry.handle)  # type: ignore[arg-type]
        self.drop(entry)
        entry.state = task if task >= 0 else HELD

    def drop(self, entry: Entry) -> None:
        """Forgets what was collected for one parameter."""
        grads = grads_of(entry.bucket)
        if self._history.rounds or grads.shared:  # else it is this rank's own
            self._history.dropped.add((self._history.rounds, entry.index))
        grads.discard(entry.slot)
        self.written.pop(entry.index, None)
        self.views.drop(entry.index)
        self.incoming.pop(entry.index, None)
        entry.state, entry.factor = USED if entry.consumed else NONE, 1.0
        self.reducer.version += 1

    # ---- step and zero_grad

    def scan(self) -> tuple[list[bool], list[int]]:
        """Which parameters have a gradient, and which were assigned or set to None since backward; takes the former."""
        if self._untouched() and USED not in self.table.state:
            return list(map(is_not, self.table.handles, repeat(None))), []
        present: list[bool] = []
        replaced: list[int] = []
        for entry in self.entries:
            grad = entry.param.grad
            present.append(grad is not None)
            if entry.state == DONE and grad is not entry.handle:
                raise RuntimeError(
                    f"parameter '{entry.name}': p.grad was set to None or assigned between backward() and step(). With "
                    "step_in_backward=True the update is made by then: clear gradients after step()."
                )
            if grad is None:
                if entry.live:
                    self.drop(entry)
                    replaced.append(entry.index)
            elif isinstance(grad, LazyGrad):
                if grad is not entry.handle:
                    raise RuntimeError(_foreign(entry))
                if entry.state == USED:
                    raise RuntimeError(
                        f"parameter '{entry.name}': step() was called twice for one gradient. Call zero_grad() and "
                        "backward() between steps."
                    )
            elif entry.handle is not None:
                self.assign(entry, grad)
                replaced.append(entry.index)
        if replaced:
            self._renew(list(map(not_, present)))
        return present, replaced

    def settle_step(self) -> list[bool]:
        """What takes part in the step, the same on every rank (a collective); see Reducer.agree for what raises."""
        present, replaced = self.scan()
        self._ours = present
        present = self.reducer.agree(self.entries, present, replaced, self._history)
        if self.table.trained == len(self.entries):
            return present
        late = [entry for entry in self.entries if present[entry.index] and entry.handle is None]
        if late:
            self.adopt(late)
            for entry in late:
                if entry.param.grad is not None:
                    self.assign(entry, entry.param.grad)
            self.reducer.agree(self.entries, present, [], self._history)
        return present

    def assign(self, entry: Entry, grad: Tensor) -> None:
        """A plain tensor in p.grad is this rank's gradient, instead of what was collected."""
        if entry.live:
            self.drop(entry)
        self.written.pop(entry.index, None)
        grads_of(entry.bucket).put(entry.slot, grad)
        entry.state, entry.factor = HELD, 1.0
        self.reducer.open = True
        self.reducer.version += 1
        entry.param.grad = entry.handle

    def use_up(self) -> None:
        """A step has used the gradients; handles stay in p.grad until zero_grad."""
        rest = [] if all(self._ours) else [e.index for e in self.entries if not (self._ours[e.index] or e.consumed)]
        self.table.clear(USED)
        for index in rest:
            self.table.state[index] = NONE
        self._reset()

    def _reset(self) -> None:
        self.reducer.reset()
        self._history.clear()
        self.written.clear()
        self.views.clear()

    def _renew(self, among: Iterable[bool]) -> None:
        """Gives parameters whose handle someone has kept a new one: the old one stands for the old gradient."""
        kept = list(map(_UNSHARED.__lt__, map(sys.getrefcount, self.table.handles)))
        for entry in compress(self.entries, map(and_, kept, among)):
            if entry.handle is not None:
                self.make_handle(entry)

    def clear(self, set_to_none: bool) -> None:
        """zero_grad."""
        table = self.table
        self._reset()
        table.clear()
        self.incoming.clear()  # of a backward that failed before the hook that takes it
        if set_to_none:
            _nothing.extend(map(setattr, table.params, repeat("grad"), repeat(None)))
        self._renew(repeat(True))
        for entry in [] if set_to_none else self.entries:
            grad = entry.param.grad
            if grad is not None and not isinstance(grad, LazyGrad):
                grad.detach_().zero_()
            if isinstance(grad, LazyGrad) or (grad is not None and entry.handle is not None):
                entry.state = HELD
                entry.param.grad = entry.handle


def _unfit(entry: Entry, grad: Tensor) -> Exception:
    if grad.requires_grad:
        return NotImplementedError(
            f"parameter '{entry.name}': expected a gradient without a graph, got one from backward(create_graph=True). "
            "Use torch.autograd.grad(..., create_graph=True) for the inner derivative."
        )
    return ValueError(f"parameter '{entry.name}': expected a dense gradient, got layout {grad.layout}.")


def _used_up(entry: Entry) -> str:
    if entry.state == DONE:
        return (
            f"parameter '{entry.name}': its gradient came again after its update. With step_in_backward=True there is one "
            "synchronised backward() a step, in which each gradient comes once: sum micro-batches under no_sync(), call step() "
            "after each backward(), and checkpoint with use_reentrant=False."
        )
    return (
        f"parameter '{entry.name}': a new backward() came after step() without zero_grad(), and the last gradients are used "
        "up. Call optimizer.zero_grad() after each step."
    )


def _foreign(entry: Entry) -> str:
    return (
        f"parameter '{entry.name}': p.grad holds the handle of another parameter or of an earlier gradient. Assign a tensor: "
        "p.grad = other.clone()."
    )
