"""Every hook that zerolite registers, in one place. Each is one line that calls a verb; all can be removed."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zerolite.bucket import Bucket, Entry
from zerolite.grads import Grads
from zerolite.reducer import grads_of
from zerolite.unit import Schedule, Unit
from zerolite.writes import check_storage

Input = tuple[Tensor, Any]  # of a forward, and the node of the graph that it came from
_task = torch._C._current_graph_task_id
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
_strided = torch.strided


class Hooks:
    """The hooks of one optimizer."""

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self.listeners: weakref.WeakKeyDictionary[Bucket, Callable[[int, Tensor], None]] = weakref.WeakKeyDictionary()

    def remove(self) -> None:
        """Removes them all."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.listeners.clear()

    def on_gradient(self, entry: Entry, grads: Grads) -> None:
        """After autograd has accumulated p.grad: see `listen`."""
        assert entry.bucket is not None
        if entry.bucket not in self.listeners:
            self.listeners[entry.bucket] = listen(entry.bucket, grads)
        hook = functools.partial(self.listeners[entry.bucket], entry.slot)
        self.handles.append(entry.param.register_post_accumulate_grad_hook(hook))

    def on_inner_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Nobody steps the optimizer that was wrapped (it shares its hooks with the wrapper, and a copy of it has them too)."""
        inner = weakref.ref(optimizer)

        def refuse(called: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if called is inner():
                raise RuntimeError(
                    f"step(): expected to be called on the ZeroOptimizer, got called on the {type(called).__name__} that it "
                    "wraps, which has no states and sees no averaged gradients. Use what ZeroOptimizer(...) returned."
                )

        self.handles.append(optimizer.register_step_pre_hook(refuse))

    def before(self, module: nn.Module, call: Callable[..., None], **options: Any) -> None:
        """call(module, args, ...) before the forward of `module`, before other hooks."""
        self.handles.append(module.register_forward_pre_hook(_of(module, call), prepend=True, **options))

    def after(self, module: nn.Module, call: Callable[..., None], **options: Any) -> None:
        """call(module, args, ..., output) after the forward of `module`."""
        self.handles.append(module.register_forward_hook(_of(module, call), **options))

    def on_model(self, model: nn.Module, schedule: Schedule) -> None:
        """The forward of the whole model: begin and end."""
        self.before(model, lambda *_: schedule.begin())
        self.after(model, lambda *_: schedule.end(torch.is_grad_enabled()))

    def on_use(self, module: nn.Module, buckets: list[Bucket]) -> None:
        """Before a module with parameters of its own runs it waits for their buckets, for what would read them behind torch's
        back. The hook refers weakly: a model that outlives its optimizer keeps no states."""
        known = [weakref.ref(bucket) for bucket in buckets]

        def wait(module: nn.Module, args: Any) -> None:
            for reference in known:
                bucket = reference()
                if bucket is not None:
                    bucket.wait()

        self.handles.append(module.register_forward_pre_hook(wait, prepend=True))

    def on_forward(self, model: nn.Module, note: Callable[[str, str], None]) -> None:
        """note("forward", "begin" or "end") around the forward of the whole model, also where it raises."""
        self.before(model, lambda *_: note("forward", "begin"))
        self.after(model, lambda *_: note("forward", "end"), always_call=True)

    def on_unit(self, module: nn.Module, unit: Unit, schedule: Schedule) -> None:
        """One unit: gather before, release after, and the same in the backward."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            schedule.enter(unit)
            if not unit.reached:  # a recomputation needs no hooks, and may stop early, without `after`
                tensors = [t for t in tensors_in((args, kwargs)) if t.requires_grad]
                unit.calls.append([(t, t.grad_fn) for t in tensors if t.grad_fn is not None])

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if unit.reached:
                return
            came = unit.calls.pop() if unit.calls else []
            self.on_backward(unit, schedule, output, came)
            schedule.leave(unit, torch.is_grad_enabled())

        self.before(module, before, with_kwargs=True)
        self.after(module, after, with_kwargs=True)

    def on_backward(self, unit: Unit, schedule: Schedule, output: Any, inputs: list[Input]) -> None:
        """One call of a unit in the backward (these hooks go with the graph)."""
        if not torch.is_grad_enabled():
            return
        outputs = [t for t in tensors_in(output) if t.requires_grad and t.grad_fn is not None]
        inputs = used(outputs, inputs) if outputs else []
        call = _Call(unit, schedule, len(inputs))
        for tensor in outputs:
            # Hooks of a node run after those of its tensors: the unit that took this tensor has passed, and is released.
            tensor.grad_fn.register_prehook(call.reach)  # type: ignore[union-attr]
            base = tensor._base if tensor._is_view() else None
            if base is not None and base.grad_fn is not None:  # a later in-place write gives the view another node
                base.grad_fn.register_prehook(call.reach)
        for tensor, node in inputs:
            if tensor.grad_fn is node:
                tensor.register_hook(call.passed)
            else:  # the forward changed it in place: its own hooks belong to what it is now
                node.register_prehook(call.passed)

    def on_part(self, module: nn.Module, unit: Unit, schedule: Schedule) -> None:
        """A module with parameters of `unit`, called perhaps without the unit's own module."""

        def wake(_: Any) -> None:
            """A backward that does not come through the unit's outputs (of a loss that the unit keeps as an attribute)."""
            if not unit.shown:
                schedule.reach(unit, False)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if unit.reached:
                return
            if not unit.calls:
                self.on_backward(unit, schedule, output, [])
            elif torch.is_grad_enabled():
                for tensor in tensors_in(output):
                    if tensor.grad_fn is not None:
                        tensor.grad_fn.register_prehook(wake)

        self.before(module, lambda *_: schedule.ensure(unit))
        self.after(module, after)

    def on_state_dict(self, module: nn.Module, fill: Callable[[nn.Module, dict[str, Any], str], None]) -> None:
        """fill(module, state_dict, prefix) after a module has put its entries into a state dict."""
        self.handles.append(module.register_state_dict_post_hook(lambda m, state, prefix, _: fill(m, state, prefix)))

    def on_load(self, module: nn.Module, borrow: Callable[[nn.Module], None]) -> None:
        """borrow(module) before a module copies entries of a state dict into its parameters."""
        self.handles.append(module.register_load_state_dict_pre_hook(lambda m, *_: borrow(m)))

    def on_loaded(self, model: nn.Module, give_back: Callable[[], None]) -> None:
        """give_back() after the model has loaded a state dict."""
        self.handles.append(model.register_load_state_dict_post_hook(lambda *_: give_back()))


def listen(bucket: Bucket, grads: Grads) -> Callable[[int, Tensor], None]:
    """What hooks of a bucket's parameters call with a slot and its parameter: grads.arrive(entry, p), or what that does with
    a first gradient in a backward that `Arrivals` names. Of thousands of small parameters each costs no more Python than this.

    One function for a bucket, not a closure for each parameter, whose cells the garbage collector would walk: 29 objects a
    parameter in all instead of 38.
    It refers weakly: the garbage collector does not look into a tensor's hooks, and a strong reference back to the tensor
    would keep model and optimizer for ever. (Handles refer weakly to their parameter.)
    """
    owner, weak, rows = weakref.ref(grads), weakref.ref(bucket), bucket.rows
    state, handles, arrivals = grads.table.state, grads.table.handles, grads_of(bucket).arrivals
    arrived = arrivals.grads

    def hook(slot: int, param: Tensor) -> None:
        index = rows[slot]
        grad: Any = param.grad
        plain = type(grad) is Tensor and state[index] < 0 and arrivals.task == _task() and grad.layout is _strided
        try:
            if plain:
                state[index] = arrivals.task
                arrived[slot] = grad
                param.grad = handles[index]
                if len(arrived) < arrivals.wanted:
                    return
            if (known := owner()) is None or (home := weak()) is None:
                arrived.clear()  # of a backward that failed
            elif plain:
                known.filled(home.entries[slot])
            else:
                known.arrive(home.entries[slot], param)
        except RuntimeError:
            if (changed := weak()) is not None:
                check_storage(changed)  # says more than that the dtype of a handle is not the parameter's any more
            raise

    return hook


def _of(module: nn.Module, call: Callable[..., None]) -> Callable[..., None]:
    """`call` as a hook of this module alone: a deep copy has the same hooks, and would gather the original."""
    own = weakref.ref(module)

    def hook(called: nn.Module, *args: Any, **kwargs: Any) -> None:
        if called is own():
            call(called, *args, **kwargs)

    return torch._dynamo.disable(hook)


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
        self.last = False  # none can after it
        unit.runs.add(self)

    def over(self, task: int) -> bool:
        """Whether this backward has come through, as far as the gradient of an input tells (those of what many units take, an
        encoder's output or a bias of positions, come long after), or an earlier one that kept no graph (which one rank may
        hold on to and another not)."""
        if self.task == task:
            return self.left < self.inputs
        return self.last and self.left == 0

    def end(self) -> None:
        """The unit is in no backward: what has not come does not come any more."""
        self.left = 0

    def reach(self, _: Any) -> None:
        task = torch._C._current_graph_task_id()
        if task != self.task:  # the first output's gradient in this backward
            self.task, self.left = task, self.inputs
            self.last = not _keeps_graph()
            self.schedule.reach(self.unit, self.inputs > 0)

    def passed(self, _: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.schedule.passed(self.unit)


_PLAIN = frozenset((type(None), str, bytes, int, float, bool, torch.dtype, torch.device, torch.Size))


def tensors_in(value: Any, depth: int = 6, found: list[Tensor] | None = None) -> list[Tensor]:
    """Tensors in nested tuples, lists, dicts, dataclasses and plain objects, in a fixed order."""
    found = [] if found is None else found
    if isinstance(value, Tensor):
        found.append(value)
    elif depth == 0 or type(value) in _PLAIN or isinstance(value, (str, bytes, int, float, nn.Module)):
        return found
    else:
        for item in _items(value):
            if type(item) not in _PLAIN:  # most of what caches and configurations hold
                tensors_in(item, depth - 1, found)
    return found


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return vars(value).values() if hasattr(value, "__dict__") else ()


_FAR = 2000  # nodes of the graph that are looked at for one call of a unit


def used(outputs: list[Tensor], inputs: list[Input]) -> list[Input]:
    """The inputs that outputs were computed from, as far as the graph says within _FAR nodes, else all.

    A cache that is handed from block to block holds the keys of every earlier block. Their gradients come long after this
    block's own, and waiting for them would keep each block whole until the end of the backward.
    """
    if len(inputs) < 2:
        return inputs
    wanted = {node for _, node in inputs}
    seen = {tensor.grad_fn for tensor in outputs}
    todo, reached = list(seen), seen & wanted
    todo = [node for node in todo if node not in wanted]
    while todo and len(reached) < len(wanted):
        if len(seen) > _FAR:
            return inputs
        for node, _ in todo.pop().next_functions:  # type: ignore[union-attr]
            if node is not None and node not in seen:
                seen.add(node)
                if node in wanted:
                    reached.add(node)
                else:
                    todo.append(node)
    return [known for known in inputs if known[1] in reached]
