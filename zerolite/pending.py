"""Parameters whose new values are on their way.

After a step that goes on beside the training loop, a parameter of an unfinished bucket has the class `PendingParameter`.
The first use of it through torch (a module's forward, `p.norm()`, `state_dict()`, `copy.deepcopy(p)`, an op on a list that
holds it) waits for its bucket, and it is a plain nn.Parameter again. So whoever reads it reads the new value, without a
hook on any module, and a forward waits for each bucket when it comes to it. What looks at no value (shape, dtype, p.grad)
does not wait.

Code that reaches memory behind torch's back (a C++ extension that is handed a parameter) is caught where the parameter
belongs to a module that is called (Hooks.on_use); `ZEROLITE_DEBUG=poison` finds the rest: NaN until the value is there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# What waits for a parameter is kept in its own __dict__, so that a dropped model and its optimizer are garbage together.
_WAIT = "_zerolite_wait"
_PENDING: dict[int, weakref.ref[Tensor]] = {}  # by id


_ATTRIBUTES = (
    *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn", "names", "is_meta", "is_cuda"),
    *(
        "is_cpu",
        "is_sparse",
        "is_quantized",
        "itemsize",
        "nbytes",
        "_version",
        "output_nr",
        "retains_grad",
        "name",
        "grad_dtype",
    ),
)
_METHODS = (
    *("size", "dim", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "element_size", "ndimension"),
    *("is_floating_point", "is_complex", "requires_grad_", "register_hook", "register_post_accumulate_grad_hook"),
    *("__hash__", "get_device", "is_shared", "has_names", "is_same_size", "is_signed", "is_inference"),
)


def _harmless() -> set[Any]:
    """What looks at no value: attributes that say what a tensor is, and p.grad."""
    found: set[Any] = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES if hasattr(getattr(Tensor, name, None), "__get__")}
    grad: Any = Tensor.grad
    found |= {grad.__get__, grad.__set__, grad.__delete__, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
    return found | {getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)}


_HARMLESS = _harmless()


class PendingParameter(nn.Parameter):
    """A parameter that waits for itself."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = [value for value in pytree.tree_leaves((args, kwargs)) if type(value) is PendingParameter]
        for value in found:
            settle(value)
        if not found:  # out of sight, in an object that is no plain container
            for known in list(_PENDING.values()):
                p = known()
                if p is not None:
                    settle(p)
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        settle(self)
        return self.__deepcopy__(memo)  # of what it is now

    def __reduce_ex__(self, protocol: Any) -> Any:
        settle(self)
        return self.__reduce_ex__(protocol)


def settle(p: Tensor) -> None:
    """Waits for one parameter's new value, where it is pending."""
    call = p.__dict__.get(_WAIT)
    if call is not None:
        call()


def mark(params: Iterable[nn.Parameter], wait: Callable[[], None]) -> bool:
    """Makes parameters pending until `unmark`; False, and nothing is done, where one of them has a class of its own."""
    found = list(params)
    if any(type(p) is not nn.Parameter for p in found):
        return False
    for p in found:
        p.__dict__[_WAIT] = wait
        _PENDING[id(p)] = weakref.ref(p)
        p.__class__ = PendingParameter
    return True


def unmark(params: Iterable[nn.Parameter]) -> None:
    """The values are there."""
    for p in params:
        if type(p) is PendingParameter:
            p.__class__ = nn.Parameter  # type: ignore[assignment]
        p.__dict__.pop(_WAIT, None)
        _PENDING.pop(id(p), None)
