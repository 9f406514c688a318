"""Models that begin on the meta device: how they get there, and how their modules say what they begin with.

    with zerolite.meta_init():        parameters have a shape and no memory; buffers, which code computes, are real
        model = Model(config)

A recipe is what fills one module's own parameters: `init` of meta_init, the `_init_weights` of the transformers model
that contains it, or its own `reset_parameters`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

Init = bool | Callable[[nn.Module], None]

_lock = threading.Lock()
_inside = threading.local()  # `made`: original -> its meta parameter, for ties; `init`. Other threads build as ever
_users = 0
_register = nn.Module.register_parameter


@contextmanager
def meta_init(init: Init = True) -> Iterator[None]:
    """Parameters that modules register inside are put on the meta device at once; buffers stay as they are.

    Each parameter has memory only while its module's __init__ fills it. ZeroOptimizer gives the values back.

    init  True: by the modules' own recipes (vectors and scalars of modules without reset_parameters stay real, with the
          values of their constructor); a function: init(module) fills the module's own parameters; False: not at
          all, they are NaN until load_pretrained()
    """
    if not isinstance(init, bool) and not callable(init):
        raise TypeError(f"init: expected True, False or a function of a module, got {init!r}")
    global _users
    before = getattr(_inside, "made", None), getattr(_inside, "init", True)
    with _lock:
        _users += 1
        nn.Module.register_parameter = _register_on_meta  # type: ignore[method-assign,assignment]
    _inside.made, _inside.init = WeakIdKeyDictionary(), init
    try:
        yield
    finally:
        _inside.made, _inside.init = before
        with _lock:
            _users -= 1
            if _users == 0:
                nn.Module.register_parameter = _register  # type: ignore[method-assign]


def _register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
    made = getattr(_inside, "made", None)
    if made is not None and isinstance(param, nn.Parameter) and not nn.parameter.is_lazy(param):
        if param not in made:
            made[param] = param if param.is_meta or _stays(module, param) else _on_meta(param)
        param = made[param]
        if param.is_meta:
            # Deep copies keep no attributes of parameters, and a parameter may be handed to another module.
            module.__dict__["zerolite_init"] = _inside.init
            param.__dict__.setdefault("zerolite_init", _inside.init)
    _register(module, name, param)


def _on_meta(param: nn.Parameter) -> nn.Parameter:
    meta = nn.Parameter(param.detach().to("meta"), param.requires_grad)
    meta.__class__ = type(param)
    meta.__dict__.update(param.__dict__)
    return meta


def _stays(module: nn.Module, param: nn.Parameter) -> bool:
    """Scales, gates and the like that a constructor fills and nothing else could: small, so they keep their values."""
    return _inside.init is True and param.dim() < 2 and _reset_of(module) is None


def _reset_of(module: nn.Module) -> Callable[[], None] | None:
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


def init_of(module: nn.Module) -> Init:
    """What meta_init was told for a module, or for a parameter that it was given."""
    for known in (module, *module._parameters.values()):
        if known is not None and "zerolite_init" in known.__dict__:
            return known.__dict__["zerolite_init"]  # type: ignore[no-any-return]
    return True


def is_left(module: nn.Module, param: nn.Parameter) -> bool:
    """Whether a module's own parameter began under meta_init(init=False)."""
    return param.__dict__.get("zerolite_init", module.__dict__.get("zerolite_init")) is False


def make_real(p: nn.Parameter, data: Tensor) -> None:
    """Gives a meta parameter memory. It stays the same object, so optimizer groups and ties stay valid.

    `p.data = ...` cannot leave the meta device; torch.utils.swap_tensors can.
    """
    fresh = nn.Parameter(torch.zeros((), dtype=data.dtype, device=data.device).expand(data.shape), p.requires_grad)
    if type(p) is not nn.Parameter:
        fresh.__class__ = type(p)
    fresh.__dict__.update(p.__dict__)
    try:
        torch.utils.swap_tensors(p, fresh)
    except RuntimeError as error:
        raise RuntimeError(
            f"a meta parameter of shape {tuple(p.shape)} cannot be given memory ({error}). Build ZeroOptimizer before the "
            "model runs and before anything refers to its parameters weakly."
        ) from error
    p.data = data  # not at once: a Parameter over a view would share its version counter


class Recipes:
    """What fills each module of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._pretrained: dict[nn.Module, Any] = {}  # module -> the innermost transformers model that contains it
        for module in model.modules():
            if hasattr(module, "_init_weights") and hasattr(module, "config"):
                self._pretrained.update(dict.fromkeys(module.modules(), module))

    def of(self, module: nn.Module) -> Callable[[], None] | None:
        """Fills the module's own parameters and buffers; None: nobody knows how."""
        init = init_of(module)
        if not isinstance(init, bool):
            return functools.partial(init, module)
        reset = _reset_of(module)
        owner = self._pretrained.get(module)
        if owner is None:
            return reset

        def fill() -> None:
            owner._init_weights(module)
            left = [p for p in module._parameters.values() if p is not None and bool(p.isnan().any())]
            if left and reset is not None:  # transformers leaves some to torch, which ran when the module was built
                reset()
                owner._init_weights(module)

        return fill

    def reaches_down(self, module: nn.Module, filled: Container[nn.Parameter]) -> bool:
        """Whether a recipe without parameters of its own is to run: transformers scales some of its children there."""
        return module in self._pretrained and any(p in filled for p in module.parameters())

    def check(self, model: nn.Module) -> None:
        """Raises ValueError for meta parameters and buffers that nothing could fill."""
        for path, module in model.named_modules():
            prefix = f"{path}." if path else ""
            recipe = self.of(module)
            for name, p in module._parameters.items():
                if p is not None and p.is_meta and recipe is None and not is_left(module, p):
                    raise ValueError(
                        f"parameter '{prefix}{name}': expected a way to initialise it off the meta device, got none in "
                        f"{type(module).__name__}. Give the module a reset_parameters(), or build the model under "
                        "zerolite.meta_init(init=function), or under meta_init(init=False) and call load_pretrained()."
                    )
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta and recipe is None:
                    raise ValueError(lost_buffer(prefix + name))


def lost_buffer(name: str) -> str:
    """The message for a buffer that was computed when the module was built, on the meta device."""
    return (
        f"buffer '{name}': expected values, got the meta device, and no reset_parameters() computes them. Build the model "
        "under `with zerolite.meta_init():`, which puts parameters on the meta device and leaves buffers as they are."
    )


def groups(model: nn.Module, units: set[nn.Module]) -> Iterator[list[nn.Module]]:
    """Modules that are filled together, children first, in the order in which a constructor makes them.

    A unit is a group, and so is a part of the model without units in it; what contains units goes by itself.
    """
    has_unit = {m for m in model.modules() if any(sub in units for sub in m.modules())}
    visited: set[nn.Module] = set()

    def deepest_first(module: nn.Module) -> Iterator[nn.Module]:
        if module not in visited:
            visited.add(module)
            for child in module.children():
                yield from deepest_first(child)
            yield module

    def walk(module: nn.Module) -> Iterator[list[nn.Module]]:
        if module in units or module not in has_unit:
            yield list(deepest_first(module))
            return
        for child in module.children():
            yield from walk(child)
        if module not in visited:
            visited.add(module)
            yield [module]

    yield from walk(model)
