"""`p.grad` after backward: a tensor with the parameter's shape and dtype and no storage.

The gradient itself is in a bucket, perhaps on another rank. What training loops do with `p.grad` works
through a few ops; anything else reads it from the bucket. Nothing here returns a stale or local value.

    norms          exact, over all ranks, computed for all parameters at once and cached
    mul_, div_     by a number: recorded, and applied inside the update (clipping costs no pass that writes)
    GradScaler     the finite check over all ranks, the scale recorded
    add_           a further backward
    zero_          zeroes
    other reads    the averaged gradient, gathered: a collective, so every rank must read
    other writes   the same, and the written tensor then replaces the gradient: in p.grad, and for what has kept the handle;
                   also writes to views of it (views.py)
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from itertools import compress
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _foreach_utils
from torch.utils import _pytree as pytree

from zerolite.entry import DONE, Entry
from zerolite.views import Views, followed

_aten = torch.ops.aten
_each_mul, _each_norm = torch._foreach_mul_, torch._foreach_norm
_pass = torch._C._disabled_torch_function_impl
_get_data: Any = Tensor.data.__get__  # type: ignore[attr-defined]
_set_data: Any = Tensor.data.__set__  # type: ignore[attr-defined]
_OF_PYTHON = frozenset((Tensor.numpy, Tensor.tolist, Tensor.__array__))  # which torch refuses of any subclass
_GONE = "p.grad: its ZeroOptimizer is gone, and the gradient with it. Keep the optimizer, or p.grad.clone()."


class Source(Protocol):
    """Where a handle reads and records (the optimizer's `Grads`)."""

    written: dict[int, Tensor]  # by row, what ops have written through handles
    incoming: dict[int, Tensor]  # by row, a gradient that autograd added, for the hook that follows
    views: Views

    def norm_tensor(self, entry: Entry, order: float) -> Tensor: ...
    def norm_tensors(self, handles: list[LazyGrad], order: float) -> list[Tensor] | None: ...
    def scale_all(self, handles: list[LazyGrad], by: object) -> bool: ...
    def finite(self, bad: bool = False) -> bool: ...
    def read(self, entry: Entry) -> Tensor: ...
    def zero(self, entry: Entry) -> None: ...


class LazyGrad(Tensor):
    """The handle that `p.grad` holds."""

    _entry: weakref.ref[Entry]
    _source: weakref.ref[Source]
    row: int  # of the entry in its table

    @staticmethod
    def __new__(cls, entry: Entry, source: Source, dtype: torch.dtype) -> LazyGrad:
        assert entry.bucket is not None
        like = entry.bucket.views[entry.slot]  # not p itself, which may be released
        handle = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, strides=like.stride(), dtype=dtype, device=like.device
        )
        # Weakly: the garbage collector does not look into p.grad, and a strong reference back to the parameter would keep model
        # and optimizer for ever once both are dropped after a step.
        handle._entry, handle._source = weakref.ref(entry), weakref.ref(source)
        handle.row = entry.index
        return handle

    def __init__(self, entry: Entry, source: Source, dtype: torch.dtype) -> None:
        pass

    @property
    def entry(self) -> Entry:
        """The parameter that it stands for the gradient of."""
        found = self._entry()
        if found is None:
            raise RuntimeError(_GONE)
        return found

    @property
    def source(self) -> Source:
        """What it asks."""
        found = self._source()
        if found is None:
            raise RuntimeError(_GONE)
        return found

    def replace(self, values: Tensor) -> None:
        """`values` is the gradient from now on, where this is p.grad."""
        param = self.entry.param
        if param.grad is self and values is not self:
            param.grad = self.source.written[self.row] = values

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        state = "used up by its update" if self.entry.consumed else "averaged over ranks when read"
        return f"LazyGrad('{self.entry.name}', shape={tuple(self.shape)}, dtype={self.dtype}, {state})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"p.grad of '{self.entry.name}' is a handle and cannot be pickled. Pickle p.grad.clone().")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch's clip_grad_norm_ calls for all p.grad at once, before torch's dispatcher; the rest as without this."""
        if (func is _each_norm or func is _each_mul) and not kwargs and len(args) == 2 and set(map(type, args[0])) == {cls}:
            handles, value = args
            if func is _each_mul:
                if handles[0].source.scale_all(handles, value):
                    return None
            elif (found := handles[0].source.norm_tensors(handles, float(value))) is not None:
                return found
        if args and type(args[0]) is cls:
            handle = args[0]
            if func in _OF_PYTHON:
                return _read_only(func(handle.clone(), *args[1:], **(kwargs or {})))
            if func == _get_data:  # torch's own would part the handle from its views
                known = _replaced(handle)
                return handle if known is None else known.data
            if func == _set_data:
                if args[1] is not handle:
                    handle.source.views.drop(handle.row)
                    handle.replace(args[1])
                return None
        result = _pass(func, types, args, kwargs or {})
        while followed.handles:
            handle = followed.handles.pop()
            handle.source.views.keep(handle)
        if type(result) is cls and (known := _replaced(result)) is not None:
            return known  # `p.grad += x` assigns what it gets to p.grad
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        special = _SPECIAL.get(func.overloadpacket)
        if special is not None:
            viewed = _viewed(args)
            result = special(func, args, kwargs)
            if result is not NotImplemented:
                if viewed:
                    _follow(func, args)
                return result
        return _materialised(func, args, kwargs)


def _viewed(args: Any) -> bool:
    """Whether views of handles in an op's first argument may be in use; what was written to them counts from now on."""
    first = args[0] if args else None
    given = first if isinstance(first, (list, tuple)) else [first]
    sources = {id(found): found for item in given if isinstance(item, LazyGrad) and (found := item._source()) and found.views}
    for source in sources.values():
        source.views.settle()
    return any(source.views for source in sources.values())


def _follow(func: Any, args: Any) -> None:
    """What was recorded for handles is done to the copies that their views are of."""
    first = args[0]
    packet, by = func.overloadpacket, args[1] if len(args) > 1 else None
    for number, handle in enumerate(first if isinstance(first, (list, tuple)) else [first]):
        copy = handle.source.views.of(handle) if isinstance(handle, LazyGrad) else None
        if copy is None:
            continue
        if packet is _aten.add_ and torch._C._current_graph_task_id() >= 0:
            handle.source.views.drop(handle.row)  # autograd accumulates: views are of the gradient before
        elif packet in (_aten.zero_, _aten._foreach_zero_):
            copy.zero_()
        elif packet is _aten._amp_foreach_non_finite_check_and_unscale_:
            copy.mul_(args[2])
        elif packet in (_aten.mul_, _aten._foreach_mul_, _aten.div_, _aten._foreach_div_):
            factor = by[number] if isinstance(by, (list, tuple)) else by
            getattr(copy, "div_" if "div" in packet.__name__ else "mul_")(factor)
        else:
            continue
        followed.handles.append(handle)


def _read_only(value: Any) -> Any:
    """An array that is a copy says so."""
    if hasattr(value, "flags"):
        value.flags.writeable = False
    return value


def _norm(func: Any, args: Any, kwargs: Any) -> Any:
    order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
    if any(args[2:4]) or any(kwargs.get(name) for name in ("dim", "keepdim")):
        return NotImplemented
    return _norm_tensor(args[0], float(order)).to(kwargs.get("dtype"))


def _foreach_norm(func: Any, args: Any, kwargs: Any) -> Any:
    order = float(args[1]) if len(args) > 1 else float(kwargs.get("ord", 2))
    dtype = args[2] if len(args) > 2 else kwargs.get("dtype")
    norms = [
        _norm_tensor(grad, order) if isinstance(grad, LazyGrad) else torch.linalg.vector_norm(grad, order) for grad in args[0]
    ]
    return [norm.to(dtype) for norm in norms]


def _replaced(handle: LazyGrad) -> Tensor | None:
    """What an op has written through the handle, as long as it is p.grad."""
    known = handle.source.written.get(handle.row)
    if known is None or handle is not handle.entry.handle or handle.entry.param.grad is not known:
        return None
    return known


def _norm_tensor(handle: LazyGrad, order: float) -> Tensor:
    check(handle)
    replaced = _replaced(handle)
    if replaced is not None:
        return torch.linalg.vector_norm(replaced, order, dtype=torch.float32)
    return handle.source.norm_tensor(handle.entry, order)


def _scale(func: Any, args: Any, kwargs: Any) -> Any:
    handle, by = args[0], args[1]
    if (
        kwargs
        or len(args) > 2
        or not isinstance(handle, LazyGrad)
        or isinstance(by, LazyGrad)
        or (isinstance(by, Tensor) and by.dim() > 0)
        or _replaced(handle) is not None
    ):
        return NotImplemented
    check(handle)
    handle.entry.factor = _apply(func.overloadpacket, handle.entry.factor, float(by))
    return handle


def _apply(packet: Any, factor: float, by: float) -> float:
    if packet in (_aten.mul_, _aten._foreach_mul_):
        return factor * by
    return factor / by if by != 0.0 else math.nan


def _foreach_scale(func: Any, args: Any, kwargs: Any) -> Any:
    grads, by = args[0], args[1]
    factors = by if isinstance(by, (list, tuple)) else [by] * len(grads)
    if any(isinstance(factor, LazyGrad) or (isinstance(factor, Tensor) and factor.dim() > 0) for factor in factors):
        return NotImplemented
    numbers = [*map(float, by)] if isinstance(by, (list, tuple)) else [float(by)] * len(grads)  # a tensor is read once
    recorded = [isinstance(grad, LazyGrad) and _replaced(grad) is None for grad in grads]
    for grad in compress(grads, recorded):
        check(grad)
    for grad, factor, number, ours in zip(grads, factors, numbers, recorded, strict=True):
        if ours:
            grad.entry.factor = _apply(func.overloadpacket, grad.entry.factor, number)
        else:
            getattr(grad, func.overloadpacket.__name__.removeprefix("_foreach_"))(factor)
    return None


def _unscale(func: Any, args: Any, kwargs: Any) -> Any:
    grads, found_inf, inv_scale = args
    grads = [replaced if isinstance(g, LazyGrad) and (replaced := _replaced(g)) is not None else g for g in grads]
    handles = [grad for grad in grads if isinstance(grad, LazyGrad)]
    plain = [grad for grad in grads if not isinstance(grad, LazyGrad)]
    if plain:
        torch._amp_foreach_non_finite_check_and_unscale_(plain, found_inf, inv_scale)
    if handles and not handles[0].source.finite(bool(plain) and bool(found_inf)):
        found_inf.fill_(1.0)
    for handle in handles:
        check(handle)
        handle.entry.factor *= float(inv_scale)
    return None


def _add(func: Any, args: Any, kwargs: Any) -> Any:
    handle, other = args[0], args[1]
    if not isinstance(handle, LazyGrad) or not torch._C._current_graph_task_id() >= 0 or kwargs.get("alpha", 1) != 1:
        return NotImplemented
    if (known := _replaced(handle)) is not None:  # a view of it was written to, as this backward's first gradient comes to know
        known.add_(other)
        return handle
    if handle.row in handle.source.incoming or handle.entry.state == torch._C._current_graph_task_id():
        raise NotImplementedError(
            f"p.grad of '{handle.entry.name}' was edited by a hook inside of backward(). Edit the gradient in p.register_hook, "
            "or p.grad after backward()."
        )
    handle.source.incoming[handle.row] = other  # autograd accumulates; the post-accumulate hook collects it
    return handle


def _zero(func: Any, args: Any, kwargs: Any) -> Any:
    handle = args[0]
    replaced = _replaced(handle)
    if replaced is not None:
        replaced.zero_()
    elif handle is handle.entry.handle:
        handle.source.zero(handle.entry)
    return handle


def _foreach_zero(func: Any, args: Any, kwargs: Any) -> Any:
    for grad in args[0]:
        grad.zero_()


def _same(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0]


_SPECIAL: dict[Any, Callable[[Any, Any, Any], Any]] = {
    _aten.linalg_vector_norm: _norm,
    _aten._foreach_norm: _foreach_norm,
    _aten.mul_: _scale,
    _aten.div_: _scale,
    _aten._foreach_mul_: _foreach_scale,
    _aten._foreach_div_: _foreach_scale,
    _aten._amp_foreach_non_finite_check_and_unscale_: _unscale,
    _aten.add_: _add,
    _aten.zero_: _zero,
    _aten._foreach_zero_: _foreach_zero,
    _aten.detach: _same,
    _aten.detach_: _same,
}


def _materialised(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an op on the real gradients; what it writes to a handle becomes that parameter's p.grad."""
    read: dict[int, tuple[LazyGrad, Tensor]] = {}

    def unwrap(value: Any) -> Any:
        if not isinstance(value, LazyGrad):
            return value
        if id(value) not in read:
            check(value)
            value.source.views.settle()
            known = _replaced(value)
            if known is None:
                known = value.source.views.of(value)
            read[id(value)] = (value, value.source.read(value.entry) if known is None else known)
        return read[id(value)][1]

    real_args, real_kwargs = pytree.tree_map(unwrap, (args, kwargs))
    if any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns):
        for handle, values in read.values():
            if _replaced(handle) is None:  # else views are of p.grad itself
                handle.source.views.note(handle, values)
    result = func(*real_args, **real_kwargs)
    for handle in _written(func, args, kwargs):
        handle.source.views.drop(handle.row)
        handle.entry.param.grad = handle.source.written[handle.row] = read[id(handle)][1]
    return result


def _written(func: Any, args: Any, kwargs: Any) -> list[LazyGrad]:
    """The handles that an op writes to, by its schema (version counters do not move below autograd); a collective's does not
    tell, and counts as writing to all that it takes."""
    values = []
    every = func.namespace == "c10d"
    for position, argument in enumerate(func._schema.arguments):
        if every or (argument.alias_info is not None and argument.alias_info.is_write):
            values.append(args[position] if position < len(args) else kwargs.get(argument.name))
    return [value for value in pytree.tree_leaves(values) if isinstance(value, LazyGrad)]


def check(handle: LazyGrad) -> None:
    """Raises where a handle stands for no gradient."""
    entry = handle.entry
    if handle is not entry.handle:
        raise RuntimeError(
            f"this p.grad of '{entry.name}' is of an earlier gradient, which zero_grad() cleared. Keep p.grad.clone()."
        )
    if entry.state == DONE:
        raise RuntimeError(
            f"p.grad of '{entry.name}': expected a gradient that rests, got one that its update in the backward used up "
            "(step_in_backward=True). Build the ZeroOptimizer without step_in_backward to clip, unscale or read gradients."
        )
    if entry.consumed:
        raise RuntimeError(
            f"p.grad of '{entry.name}': expected a gradient, got one that optimizer.step() used up. Read it between "
            "backward() and step(); call optimizer.zero_grad() before the next backward()."
        )
    if handle.row in handle.source.incoming:
        raise NotImplementedError(
            f"p.grad of '{entry.name}' was used by a hook while backward() adds to it. Use p.register_hook, or p.grad after "
            "backward()."
        )


# As DTensor does: lists of handles go to the foreach functions, so that clipping asks once for all of them.
_foreach_types: list[type] = getattr(_foreach_utils, "_foreach_supported_types", [])
if LazyGrad not in _foreach_types:
    _foreach_types.append(LazyGrad)
