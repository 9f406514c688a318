"""Optimizer rules on a range of a bucket: Adam on the fused kernels, any other elementwise optimizer by its own step.

A rule's state covers one element range of one bucket. `Target` says which part of it a step updates.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from zerolite.buffer import Room
from zerolite.kernels import join, reduce_, split_
from zerolite.layout import Piece
from zerolite.moments import MOMENTS, Moments
from zerolite.probe import clone, probe


class Target(NamedTuple):
    """What to update: the position in `pieces`, the element range, and what scales it. Where the caller counts updates
    (State.counted), a target may go on over the neighbours that follow in `pieces`, padding between them included."""

    piece: int
    start: int
    stop: int
    group: dict[str, Any]  # the user's param group, read at every step
    steps: int  # updates of this parameter, this one included
    factor: float  # product of the recorded gradient factors (clipping, unscaling)


#: (param, rest, sources, mean) of one element range: updates its targets, once.
Work = Callable[[Tensor, Tensor, list[Tensor], float], None]


class State(Protocol):
    """Optimizer states of one element range of a bucket."""

    counted: bool  # the number of updates is kept by the caller (Target.steps), not in the state
    needed: frozenset[str]  # names without which a state that is written is another optimizer's

    def prepare(self, targets: list[Target]) -> Work:
        """What updates the targets of `param` and `rest` from the average of `sources`, for param groups as they are now."""
        ...

    def read(self, piece: int) -> dict[str, Any]:
        """The state of one piece, under torch's names; tensors are views, or what rounded moments stand for."""
        ...

    def write(self, piece: int, values: dict[str, Any]) -> None:
        """Replaces the state of one piece."""
        ...

    def tensors(self) -> list[Tensor]:
        """Every tensor of elements that is held."""
        ...


class Rule(Protocol):
    """How one optimizer class updates."""

    width: int  # bytes of state an element, without remainder or master
    group_width: int  # bytes of state a group of layout.ALIGN elements, beside
    threaded: bool  # its work may run beside the training loop

    def check(self, group: dict[str, Any]) -> None:
        """Raises NotImplementedError for options of a param group that this rule does not have."""
        ...

    def allocate(self, pieces: Sequence[Piece], numel: int, room: Room) -> State: ...


class AdamRule:
    """torch.optim.Adam and AdamW (without amsgrad) on the fused kernels; moments stored as `moments` says."""

    threaded = True

    def __init__(self, moments: str = "fp32") -> None:
        self.storage = MOMENTS[moments]
        self.width, self.group_width = self.storage.width, self.storage.group_width

    def check(self, group: dict[str, Any]) -> None:
        _check_options("Adam", group)
        if group["amsgrad"]:
            raise NotImplementedError(
                "Adam: expected amsgrad=False as when the ZeroOptimizer was built, got True. Build it with amsgrad=True."
            )

    def allocate(self, pieces: Sequence[Piece], numel: int, room: Room) -> AdamState:
        return AdamState(pieces, self.storage(numel, room))


class AdamState:
    """Two moments for each element of a range."""

    counted = True
    needed = frozenset(("step", "exp_avg", "exp_avg_sq"))
    pieces: Sequence[Piece]
    moments: Moments

    def __init__(self, pieces: Sequence[Piece], moments: Moments) -> None:
        self.pieces = pieces
        self.moments = moments

    def prepare(self, targets: list[Target]) -> AdamWork:
        rows: dict[tuple[int, int, float], int] = {}
        table: list[tuple[float, ...]] = []
        spans: list[list[int]] = []
        last, at = -2, -1  # the piece before this one, and its row
        for piece, start, stop, group, steps, factor in targets:
            key = (id(group), steps, factor)
            row = rows.get(key, -1)
            if row < 0:
                row = rows[key] = len(table)
                table.append((*adam_row(group, steps, factor), float(steps)))
            if piece == last + 1 and row == at and over_padding(group):
                spans[-1][1] = stop  # the padding between two neighbours is updated with them: it stays 0
            else:
                spans.append([start, stop, row])
            last, at = piece, row
        return AdamWork(self.moments, spans, table)

    def read(self, piece: int) -> dict[str, Any]:
        m, v = self.moments.read(_part(self.pieces[piece]))
        return {"exp_avg": m, "exp_avg_sq": v}

    def write(self, piece: int, values: dict[str, Any]) -> None:
        part = _part(self.pieces[piece])
        device = self.moments.tensors()[0].device
        none = torch.zeros(part.stop - part.start, device=device)
        m, v = (values[name].to(device, torch.float32) if name in values else none for name in ("exp_avg", "exp_avg_sq"))
        self.moments.write(part, m.reshape(-1), v.reshape(-1))

    def tensors(self) -> list[Tensor]:
        return self.moments.tensors()


def over_padding(group: dict[str, Any]) -> bool:
    """Whether an update of padding leaves it 0: eps is not so small that it divides 0 by 0 (its factor is at least 0.01)."""
    return float(group["eps"]) > 1e-35


class AdamWork:
    """One update of a range by Adam: which elements, and the columns `kernels.MOMENT_ROW` of each row that they name."""

    def __init__(self, moments: Moments, spans: list[list[int]], table: list[tuple[float, ...]]) -> None:
        self.moments = moments
        self.spans = spans
        self.table = table

    def __call__(self, param: Tensor, rest: Tensor, sources: list[Tensor], mean: float) -> None:
        if self.spans:
            self.moments.update(param, rest, sources, torch.tensor(self.spans, device="cpu"), self.table, mean)

    def cut(self, start: int, stop: int) -> AdamWork | None:
        """The part in the element range [start, stop), which begins with a group; None where there is nothing to do."""
        inside = [(max(lo, start), min(hi, stop), row) for lo, hi, row in self.spans if lo < stop and hi > start]
        if not inside:
            return None
        spans = [[lo - start, hi - start, row] for lo, hi, row in inside]
        return AdamWork(self.moments.part(start, stop), spans, self.table)

    def at(self, tensors: dict[str, Tensor]) -> AdamWork:
        """The same update of moments that are elsewhere: `tensors` by the names of moments.named()."""
        return AdamWork(self.moments.at(tensors), self.spans, self.table)


def adam_row(group: dict[str, Any], steps: int, factor: float) -> tuple[float, ...]:
    """The columns `kernels.ADAM_ROW` of a param group at update number `steps`, in binary64."""
    lr, eps, decay = float(group["lr"]), float(group["eps"]), float(group["weight_decay"])
    beta1, beta2 = (float(beta) for beta in group["betas"])
    coupled = not group.get("decoupled_weight_decay", False)
    root = math.sqrt(1.0 - beta2**steps)
    return (
        -factor if group["maximize"] else factor,
        decay if coupled else 0.0,
        1.0 if coupled else 1.0 - lr * decay,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        eps * root,
        lr * root / (1.0 - beta1**steps),
    )


class TorchRule:
    """Any other optimizer whose update of an element depends on that element alone: its own `step` on fp32 pieces."""

    group_width = 0
    threaded = False  # it sets the number of intra-op threads, which belongs to the process

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.width = probe(optimizer)

    def check(self, group: dict[str, Any]) -> None:
        _check_options(type(self.optimizer).__name__, group)

    def allocate(self, pieces: Sequence[Piece], numel: int, room: Room) -> TorchState:
        return TorchState(self.optimizer, pieces, room.device)


class TorchState:
    """A clone of the user's optimizer that owns one fp32 tensor for each piece."""

    counted = False
    needed: frozenset[str] = frozenset()

    def __init__(self, optimizer: torch.optim.Optimizer, pieces: Sequence[Piece], device: torch.device) -> None:
        self.pieces = pieces
        self.keys = [torch.nn.Parameter(torch.empty(0, device=device)) for _ in pieces]
        self.optimizer = clone(optimizer, [])

    def prepare(self, targets: list[Target]) -> Work:
        now = {id(target.group): copy.deepcopy({k: v for k, v in target.group.items() if k != "params"}) for target in targets}
        return lambda *tensors: self._step(targets, now, *tensors)

    def _step(
        self,
        targets: list[Target],
        now: dict[int, dict[str, Any]],
        param: Tensor,
        rest: Tensor,
        sources: list[Tensor],
        mean: float,
    ) -> None:
        gradient = torch.empty(param.numel(), dtype=torch.float32, device=param.device)
        reduce_(gradient, sources, mean, False)
        groups: dict[int, dict[str, Any]] = {}
        for target in targets:
            key, part = self.keys[target.piece], slice(target.start, target.stop)
            key.data = join(param[part], rest[part])
            key.grad = gradient[part].mul_(target.factor)
            groups.setdefault(id(target.group), {**now[id(target.group)], "params": []})["params"].append(key)
        self.optimizer.param_groups = list(groups.values())
        with _single_thread():
            _bare_step(type(self.optimizer))(self.optimizer)
        for target in targets:
            key, part = self.keys[target.piece], slice(target.start, target.stop)
            split_(param[part], rest[part], key.data)
            key.grad = None
            key.data = key.data.new_empty(0)

    def read(self, piece: int) -> dict[str, Any]:
        return dict(self.optimizer.state.get(self.keys[piece], {}))

    def write(self, piece: int, values: dict[str, Any]) -> None:
        device = self.keys[piece].device
        self.optimizer.state[self.keys[piece]] = {name: _own(value, device) for name, value in values.items()}

    def tensors(self) -> list[Tensor]:
        values = [value for state in self.optimizer.state.values() for value in state.values()]
        return [value for value in values if isinstance(value, Tensor) and value.dim() > 0]


# torch's own layers around `step`: global hooks, which would run for each part of a step, and the mode of gradients.
_TORCH_LAYERS = {
    layer(lambda self: None).__code__
    for layer in (torch.optim.Optimizer.profile_hook_step, getattr(torch_optimizer, "_use_grad_for_differentiable", None))
    if layer is not None
}


def _bare_step(kind: type[torch.optim.Optimizer]) -> Callable[[torch.optim.Optimizer], object]:
    """Its step as it was written, with its own decorators."""
    step: Any = kind.step
    while getattr(step, "__code__", None) in _TORCH_LAYERS:
        step = step.__wrapped__
    return step


def _own(value: Any, device: torch.device) -> Any:
    """A copy of a state; of elements in fp32 where they are updated, as its step would make them."""
    if not isinstance(value, Tensor):
        return copy.copy(value)
    if value.dim() == 0:
        return value.clone()
    return value.to(device, torch.float32 if value.is_floating_point() else value.dtype, copy=True)


def make_rule(optimizer: torch.optim.Optimizer, moments: str = "fp32", update: str = "auto") -> Rule:
    """The rule for an optimizer instance, a storage of moments and a way of an offloaded update.

    Raises NotImplementedError where its update is not elementwise, ValueError where it has no such moments or way.
    """
    if not isinstance(moments, str) or moments not in MOMENTS:
        raise ValueError(f"moments: expected one of {', '.join(map(repr, MOMENTS))}, got {moments!r}")
    for group in optimizer.param_groups:
        _check_options(type(optimizer).__name__, group)
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and not any(g["amsgrad"] for g in optimizer.param_groups):
        return AdamRule(moments)
    if moments != "fp32":
        raise ValueError(
            f"moments={moments!r}: expected torch.optim.Adam or AdamW without amsgrad, got {_describe(optimizer)}. "
            "Use one of them or moments='fp32'."
        )
    if update == "stream":
        raise ValueError(
            f"update='stream': expected torch.optim.Adam or AdamW without amsgrad, got {_describe(optimizer)}, whose step "
            "runs on the host. Use update='auto'."
        )
    return TorchRule(optimizer)


def _describe(optimizer: torch.optim.Optimizer) -> str:
    name = type(optimizer).__name__
    return f"{name} with amsgrad" if any(group.get("amsgrad") for group in optimizer.param_groups) else name


def _check_options(name: str, group: dict[str, Any]) -> None:
    for option in ("differentiable", "capturable"):
        if group.get(option):
            raise NotImplementedError(f"{name}: expected {option}=False, got True. Build it without {option}.")


class _single_thread:
    """One intra-op thread: PyTorch cuts large tensors at multiples of numel / threads, and the scalar loop that ends
    each part rounds some operations differently from the vector loop, so the bits would depend on the cut."""

    def __enter__(self) -> None:
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.threads)


def _part(piece: Piece) -> slice:
    return slice(piece.offset, piece.offset + piece.stop - piece.start)


def comparable(groups: Iterable[dict[str, Any]], names: Sequence[str]) -> list[tuple[object, ...]]:
    """Options of these names of param groups, as far as ranks can compare them."""
    return [tuple(v if type(v) in _PLAIN else told(v) for v in map(group.get, names)) for group in groups]


_PLAIN = {float, int, bool, str, type(None)}


def told(value: Any, deep: bool = False) -> object:
    """What ranks compare of an option: a number, or numbers, whatever holds them; else the type."""
    try:
        if isinstance(value, Tensor):
            return value.item() if value.numel() == 1 else (tuple(value.shape), str(value.dtype))
        if type(value) in _PLAIN:
            return value
        if isinstance(value, (tuple, list)) and not deep:
            return tuple(told(part, True) for part in value)
        return value.item() if hasattr(value, "item") else type(value).__name__
    except Exception:  # of another library's number, a tensor on the meta device
        return type(value).__name__
