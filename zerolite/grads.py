"""Gradients as the training loop sees them: what `p.grad` means before, at and after a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zerolite.bucket import Entry
from zerolite.lazy_grad import LazyGrad
from zerolite.norm import gradient_norms
from zerolite.reducer import Reducer, grads_of


class Grads:
    """Connects autograd and the handles in p.grad with the reducer.

    A parameter takes part in a step where its p.grad is not None on any rank, as in torch: a handle stands for
    what was collected, a plain tensor that the user assigned replaces it, and None drops it.
    """

    reducer: Reducer
    entries: list[Entry]
    on_collected: Callable[[Entry], None]

    def __init__(self, reducer: Reducer, entries: list[Entry], on_collected: Callable[[Entry], None]) -> None:
        self.reducer = reducer
        self.entries = entries
        self.on_collected = on_collected
        self._norms: tuple[int, dict[float, list[float]]] = (-1, {})

    def make_handle(self, entry: Entry) -> None:
        """The handle of one parameter; fp16 shows fp32 (GradScaler refuses to unscale fp16 gradients)."""
        dtype = entry.param.dtype
        if dtype == torch.float16:
            dtype = torch.float32
            entry.param.grad_dtype = None
        entry.handle = LazyGrad(entry, self, dtype)

    # ---- backward

    def arrive(self, entry: Entry, param: Tensor) -> None:
        """Autograd has written p.grad, or added to the handle in it."""
        grad = param.grad
        if isinstance(grad, LazyGrad):
            if entry.consumed:
                raise RuntimeError(
                    f"parameter '{entry.name}': a new backward() came after step() without zero_grad(), and the last "
                    "gradients are used up. Call optimizer.zero_grad() after each step."
                )
            handle, grad = grad, grad.incoming
            handle.incoming = None
        elif grad is not None:
            if entry.live:
                self.drop(entry)  # p.grad was set to None in between (model.zero_grad())
            entry.factor, entry.consumed = 1.0, False
        if grad is None:
            return
        if grad.requires_grad:
            raise NotImplementedError(
                f"parameter '{entry.name}': expected a gradient without a graph, got one from backward(create_graph=True). "
                "Use torch.autograd.grad(..., create_graph=True) for the inner derivative."
            )
        if grad.layout != torch.strided:
            raise ValueError(f"parameter '{entry.name}': expected a dense gradient, got layout {grad.layout}.")
        self.reducer.collect(entry, grad)
        param.grad = entry.handle
        self.on_collected(entry)

    # ---- what handles ask (lazy_grad.Source)

    def norm(self, entry: Entry, order: float) -> float:
        """Norm of the averaged gradient, without factors; all parameters' norms are computed at once."""
        version, known = self._norms
        if version != self.reducer.version:
            known = {}
        if order not in known:
            known[order] = gradient_norms(self.reducer, self.entries, order)
            self._norms = (self.reducer.version, known)
        return known[order][entry.index]

    def finite(self) -> bool:
        """Whether all averaged gradients are finite, the same answer on every rank (a collective)."""
        self.reducer.settle("norm agreement")
        suspect = self.reducer.suspect.clone()
        self.reducer.comm.max_(suspect, "norm finite")
        self.reducer.suspect.copy_(suspect)
        return self.reducer.finite()

    def read(self, entry: Entry) -> Tensor:
        """The averaged gradient with its factors, whole (a collective). Shape of the parameter, the handle's dtype."""
        self.reducer.settle(f"read {entry.name}")
        assert entry.bucket is not None
        full = entry.bucket.whole_gradient()
        value = grads_of(entry.bucket).view(full, entry.slot)
        return (value.float() * entry.factor).to(entry.handle.dtype) if entry.factor != 1.0 else value.to(entry.handle.dtype)

    def zero(self, entry: Entry) -> None:
        """p.grad becomes zeros, which still takes part in the next step."""
        self.drop(entry)
        entry.live, entry.consumed = True, False

    def drop(self, entry: Entry) -> None:
        """Forgets what was collected for one parameter."""
        grads_of(entry.bucket).discard(entry.slot)
        entry.live, entry.factor = False, 1.0
        self.reducer.version += 1

    # ---- step and zero_grad

    def scan(self) -> list[bool]:
        """Which parameters have a gradient on this rank; takes plain tensors that were assigned to p.grad."""
        present = []
        for entry in self.entries:
            grad = entry.param.grad
            present.append(grad is not None)
            if grad is None:
                if entry.live:
                    self.drop(entry)
            elif isinstance(grad, LazyGrad):
                if entry.consumed:
                    raise RuntimeError(
                        f"parameter '{entry.name}': step() was called twice for one gradient. Call zero_grad() and "
                        "backward() between steps."
                    )
            elif entry.bucket is not None and entry.bucket.trained:
                self.assign(entry, grad)
        return present

    def assign(self, entry: Entry, grad: Tensor) -> None:
        """A plain tensor in p.grad is this rank's gradient, instead of what was collected."""
        if entry.live:
            self.drop(entry)
        grads_of(entry.bucket).put(entry.slot, grad)
        entry.live, entry.consumed, entry.factor = True, False, 1.0
        self.reducer.open = True
        self.reducer.version += 1
        entry.param.grad = entry.handle

    def use_up(self) -> None:
        """A step has used the gradients; handles stay in p.grad until zero_grad."""
        for entry in self.entries:
            if entry.param.grad is not None:
                entry.consumed = True
            entry.live, entry.factor = False, 1.0
        self.reducer.reset()

    def clear(self, set_to_none: bool) -> None:
        """zero_grad."""
        self.reducer.reset()
        for entry in self.entries:
            p = entry.param
            entry.consumed, entry.factor = False, 1.0
            entry.live = False
            if set_to_none:
                p.grad = None
            elif isinstance(p.grad, LazyGrad):
                entry.live = True
            elif p.grad is not None:
                p.grad.detach_().zero_()
