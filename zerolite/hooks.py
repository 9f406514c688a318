"""Every hook that zerolite registers, in one place. Each is one line that calls a verb; all can be removed."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zerolite.bucket import Entry
from zerolite.unit import Schedule, Unit


class Hooks:
    """The hooks of one optimizer."""

    def __init__(self) -> None:
        self.handles: list[Any] = []

    def remove(self) -> None:
        """Removes them all."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def on_gradient(self, entry: Entry, arrive: Callable[[Entry, Tensor], None]) -> None:
        """arrive(entry, param), a method, after autograd has accumulated p.grad.

        The hook refers weakly: the garbage collector does not look into a tensor's hooks, and a strong reference back to
        the tensor would keep model and optimizer for ever.
        """
        owner, call, weak = weakref.ref(arrive.__self__), arrive.__func__, weakref.ref(entry)  # type: ignore[attr-defined]

        def hook(param: Tensor) -> None:
            if (grads := owner()) is not None and (target := weak()) is not None:
                call(grads, target, param)

        self.handles.append(entry.param.register_post_accumulate_grad_hook(hook))

    def on_model(self, model: nn.Module, schedule: Schedule) -> None:
        """The forward of the whole model: begin and end."""
        begin = torch._dynamo.disable(lambda *_: schedule.begin())
        end = torch._dynamo.disable(lambda *_: schedule.end(torch.is_grad_enabled()))
        self.handles.append(model.register_forward_pre_hook(begin, prepend=True))
        self.handles.append(model.register_forward_hook(end))

    def on_forward(self, model: nn.Module, note: Callable[[str, str], None]) -> None:
        """note("forward", "begin" or "end") around the forward of the whole model, also where it raises."""
        begin = torch._dynamo.disable(lambda *_: note("forward", "begin"))
        end = torch._dynamo.disable(lambda *_: note("forward", "end"))
        self.handles.append(model.register_forward_pre_hook(begin, prepend=True))
        self.handles.append(model.register_forward_hook(end, always_call=True))

    def on_unit(self, module: nn.Module, unit: Unit, schedule: Schedule) -> None:
        """One unit: gather before, release after, and the same in the backward."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            schedule.enter(unit)
            if not unit.reached:  # a recomputation needs no hooks, and may stop early, without `after`
                unit.calls.append([t for t in tensors_in((args, kwargs)) if t.grad_fn is not None])

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if unit.reached:
                return
            came = unit.calls.pop() if unit.calls else []
            self.on_backward(unit, schedule, output, came)
            schedule.leave(unit, torch.is_grad_enabled())

        self.handles.append(module.register_forward_pre_hook(torch._dynamo.disable(before), prepend=True, with_kwargs=True))
        self.handles.append(module.register_forward_hook(torch._dynamo.disable(after), with_kwargs=True))

    def on_backward(self, unit: Unit, schedule: Schedule, output: Any, inputs: list[Tensor]) -> None:
        """One call of a unit in the backward (these hooks go with the graph)."""
        outputs = [t for t in tensors_in(output) if t.grad_fn is not None] if torch.is_grad_enabled() else []
        call = _Call(unit, schedule, len(inputs))
        for tensor in outputs:
            tensor.register_hook(call.reach)
            base = tensor._base if tensor._is_view() else None
            if base is not None and base.grad_fn is not None:  # a later in-place write gives the view another node
                base.grad_fn.register_prehook(call.reach)
        for tensor in inputs if outputs else []:
            tensor.register_hook(call.passed)

    def on_part(self, module: nn.Module, unit: Unit, schedule: Schedule) -> None:
        """A module with parameters of `unit`, called perhaps without the unit's own module."""

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if not unit.calls and not unit.reached:
                self.on_backward(unit, schedule, output, [])

        ensure = torch._dynamo.disable(lambda *_: schedule.ensure(unit))
        self.handles.append(module.register_forward_pre_hook(ensure, prepend=True))
        self.handles.append(module.register_forward_hook(torch._dynamo.disable(after)))

    def on_state_dict(self, module: nn.Module, fill: Callable[[nn.Module, dict[str, Any], str], None]) -> None:
        """fill(module, state_dict, prefix) after a module has put its entries into a state dict."""
        self.handles.append(module.register_state_dict_post_hook(lambda m, state, prefix, _: fill(m, state, prefix)))

    def on_load(self, module: nn.Module, borrow: Callable[[nn.Module], None]) -> None:
        """borrow(module) before a module copies entries of a state dict into its parameters."""
        self.handles.append(module.register_load_state_dict_pre_hook(lambda m, *_: borrow(m)))

    def on_loaded(self, model: nn.Module, give_back: Callable[[], None]) -> None:
        """give_back() after the model has loaded a state dict."""
        self.handles.append(model.register_load_state_dict_post_hook(lambda *_: give_back()))


class _Call:
    """One forward call of a unit, as its backward sees it.

    It refers to no tensor: torch's own multi-gradient hooks keep the graph's nodes, whose hooks refer back, for ever.
    """

    def __init__(self, unit: Unit, schedule: Schedule, inputs: int) -> None:
        self.unit = unit
        self.schedule = schedule
        self.inputs = inputs
        self.left = 0  # inputs whose gradient is still to come in this backward
        self.task = -1  # the backward that has reached an output

    def reach(self, _: Any) -> None:
        task = torch._C._current_graph_task_id()
        if task != self.task:  # the first output's gradient in this backward
            self.task, self.left = task, self.inputs
            self.schedule.reach(self.unit, self.inputs > 0)

    def passed(self, _: Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            self.schedule.passed(self.unit)


def tensors_in(value: Any, depth: int = 6) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists, dicts, dataclasses and plain objects, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif depth == 0 or value is None or isinstance(value, (str, bytes, int, float, nn.Module)):
        return
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, depth - 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name, None), depth - 1)
    elif hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from tensors_in(item, depth - 1)
