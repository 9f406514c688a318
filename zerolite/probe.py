"""Whether an optimizer can be run on flat pieces of parameters, and what its states take: steps on a small matrix."""

from __future__ import annotations

import copy
from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def clone(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The same optimizer class with the same attributes, no state, no hooks, and other param groups."""
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    twin.state = defaultdict(dict)
    twin.param_groups = groups
    for attribute, value in optimizer.__dict__.items():
        if attribute.startswith("_optimizer_") and attribute.endswith("_hooks"):
            setattr(twin, attribute, type(value)())
    twin.__dict__.pop("step", None)  # a scheduler may have wrapped the instance's step
    return twin


_LEAST_LR = 1e-3  # below it, as a warm-up begins, a probe could see nothing move


def probe(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state an element, from steps on a small matrix with the options of each group (the first one's count); raises
    where a cut of it is updated differently, or in a step of its own, as another bucket's or rank's."""
    first, *_ = [_probe_group(optimizer, group) for group in optimizer.param_groups]
    return first


def _probe_group(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> int:
    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(8, 16, generator=generator, dtype=torch.float32, device="cpu") for _ in range(4))
    name = type(optimizer).__name__
    lr = group.get("lr")
    if lr is not None and abs(float(lr)) < _LEAST_LR:
        group = {**group, "lr": torch.full_like(lr, 1e-2) if isinstance(lr, Tensor) else 1e-2}

    known = [(p, optimizer.state[p]) for p in group["params"] if p in optimizer.state]

    def run(start: Tensor, grads: list[Tensor]) -> tuple[Tensor, torch.optim.Optimizer]:
        part = torch.nn.Parameter(start.clone())
        twin = clone(optimizer, [{**group, "params": [part]}])
        if known:  # it has stepped; some optimizers fill it when they are built
            twin.state[part] = _initial_state(known, part)
        for grad in grads:
            part.grad = grad.clone()
            twin.step()
        return part.detach().reshape(-1), twin

    try:
        whole, twin = run(start, grads)
        cut = [t.reshape(-1).split(64) for t in (start, *grads)]
        pieces = torch.cat([run(piece, list(values))[0] for piece, *values in zip(*cut, strict=True)])
    except Exception as error:
        raise NotImplementedError(
            f"{name}: its step cannot run on a flat piece of a parameter ({str(error).splitlines()[0]}), and zerolite cuts "
            "parameters anywhere. Use an elementwise optimizer (Adam, AdamW, SGD, ...)."
        ) from error
    if torch.equal(whole, start.reshape(-1)):
        raise NotImplementedError(
            f"{name}: its step leaves the parameters of its param groups as they are; perhaps it steps another optimizer. "
            "Give that one to ZeroOptimizer, and wrap the ZeroOptimizer."
        )
    if not torch.allclose(whole, pieces, rtol=1e-5, atol=1e-7):
        raise NotImplementedError(
            f"{name}: its update of an element depends on other elements of the parameter, which other ranks hold. "
            "Use an elementwise optimizer (Adam, AdamW, SGD, ...)."
        )
    before, after = ({k: repr(v) for k, v in options.items() if k != "params"} for options in (group, twin.param_groups[0]))
    changed = [key for key in after if after[key] != before.get(key)]
    if changed:
        raise NotImplementedError(
            f"{name}: its step writes {changed} to the param group once a step, and zerolite runs one step a bucket. "
            "Use an optimizer that keeps its state in `state`."
        )
    _check_state(name, twin, set(twin.state) - {twin.param_groups[0]["params"][0]})
    states = [(key, value) for state in twin.state.values() for key, value in state.items() if isinstance(value, Tensor)]
    for key, value in states:
        if value.dim() > 0 and value.shape != start.shape:
            raise NotImplementedError(
                f"{name}: expected states of the parameter's shape {tuple(start.shape)}, or scalars (torch.tensor(0.0)), got "
                f"'{key}' of shape {tuple(value.shape)}, which cannot be cut with the parameter."
            )
    return sum(value.numel() * value.element_size() for _, value in states if value.dim() > 0) // start.numel()


def _check_state(name: str, optimizer: torch.optim.Optimizer, others: set[Any]) -> None:
    """Raises NotImplementedError for states that could not be cut, saved and loaded: of no parameter, in a container."""
    if others:
        raise NotImplementedError(
            f"{name}: expected states of parameters, got one of {next(iter(others))!r}, which belongs to all of them, and "
            "zerolite runs one step a bucket. Keep it for each parameter (state[p]['step'])."
        )
    for values in optimizer.state.values():
        for key, value in values.items():
            if not isinstance(value, Tensor) and _holds_tensors(value):
                raise NotImplementedError(
                    f"{name}: expected states that are tensors or numbers, got '{key}', a {type(value).__name__} of tensors, "
                    "which cannot be cut with the parameter. Keep each under a key of its own."
                )


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple, set, deque)) and any(map(_holds_tensors, value)))


def _initial_state(known: list[tuple[Tensor, dict[str, Any]]], part: Tensor) -> dict[str, Any]:
    """The state that an optimizer gave the first parameter of a group, for a parameter of another shape."""
    p, state = next(((p, state) for p, state in known if p.dim() > 0 and p.numel() > 0), known[0])
    return {
        name: torch.full_like(part, float(value.reshape(-1)[0]), requires_grad=False)
        if isinstance(value, Tensor) and value.shape == p.shape and value.numel() > 0 and name != "step"
        else copy.deepcopy(value)
        for name, value in state.items()
    }
