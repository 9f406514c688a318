"""Views of `p.grad`: `p.grad[:n] = 0` and `p.grad.view(-1)[k] = 0` write to one.

A handle has no storage, so its views are of a copy of the gradient, the same one for all of its views. They share the
handle's version counter: where that has moved, something was written, and the copy becomes the gradient. Copies are
looked at when anything else is done with a gradient; one that no view holds any more, and that nobody wrote to, is
let go then.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Viewable(Protocol):
    """A handle."""

    row: int  # of the entry in its table

    @property
    def _version(self) -> int: ...

    def replace(self, values: Tensor) -> None: ...


class Viewed(NamedTuple):
    """What views of a handle are of."""

    handle: Viewable
    values: Tensor
    version: int  # of the handle, if nothing was written since
    holders: float  # of the memory, without views


class Views:
    """Handles of one optimizer that views were taken of since the last step or zero_grad."""

    def __init__(self) -> None:
        self._seen: dict[int, Viewed] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def note(self, handle: Viewable, values: Tensor) -> None:
        """A view of `values` is about to be taken in place of one of `handle`."""
        if handle.row not in self._seen:
            self._seen[handle.row] = Viewed(handle, values, handle._version, _holders(values))

    def of(self, handle: Viewable) -> Tensor | None:
        """The copy that this handle's views are of."""
        seen = self._seen.get(handle.row)
        return seen.values if seen is not None and seen.handle is handle else None

    def settle(self) -> None:
        """What was written to views becomes the gradient of their parameters."""
        for row, seen in list(self._seen.items()):
            if seen.handle._version != seen.version:
                del self._seen[row]
                seen.handle.replace(seen.values)
            elif _holders(seen.values) == seen.holders:
                del self._seen[row]

    def keep(self, handle: Viewable) -> None:
        """What was just done to the handle was done to the copy as well: nothing was written to a view."""
        seen = self._seen.get(handle.row)
        if seen is not None and seen.handle is handle:
            self._seen[handle.row] = seen._replace(version=handle._version)

    def drop(self, row: int) -> None:
        """Views of this gradient are of an earlier one."""
        self._seen.pop(row, None)

    def clear(self) -> None:
        self._seen.clear()


class _Followed(threading.local):
    """Handles whose version counter moves with the op that this thread is in, though nothing was written to their views."""

    def __init__(self) -> None:
        self.handles: list[Any] = []


followed = _Followed()


def owned(values: Tensor) -> Tensor:
    """What autograd has added, or a copy of it where somebody else may have it too: the caller of backward(), or another
    parameter. (It makes that copy itself of what it puts into p.grad, but gives away what it adds.)"""
    if type(values) is not Tensor or values.layout is not torch.strided:
        return values
    count = getattr(Tensor, "_use_count", lambda _: 0)
    base = values._base
    alone = _holders(values) == 2 if base is None else _holders(values) == 3 and count(base) == 2
    return values if alone and count(values) == 1 else values.clone()


def _holders(values: Tensor) -> float:
    """How many tensors use the memory; NaN, which equals nothing, where torch does not tell: then it is kept until the step."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return float(count(values.untyped_storage()._cdata)) if count is not None else float("nan")
