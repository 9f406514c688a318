"""What is asked of a ZeroOptimizer, checked on every rank before anything is changed, and compared over ranks."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zerolite.buffer import Link, link_for
from zerolite.comm import Comm
from zerolite.comm.ledger import RankError
from zerolite.dtypes import is_dense
from zerolite.entry import TRAINED, Entry, Table
from zerolite.meta import Recipes
from zerolite.options import check_bucket_mb, check_update
from zerolite.partition import (
    DTYPES,
    NOT_TRAINED,
    UnitSpec,
    check_compute_dtype,
    check_model,
    check_parameter,
    device_of,
    find_units,
    names_of,
)
from zerolite.placement import Plan, make_plan
from zerolite.update import Rule, make_rule, told


@dataclass
class Checked:
    """What the checks established, before anything is changed."""

    plan: Plan
    rule: Rule
    entries: list[Entry]
    specs: list[UnitSpec]
    dtype: torch.dtype | None  # param_dtype
    classes: Any  # units=, where parameters rest sharded
    limit: int  # bytes of a bucket
    device: torch.device
    link: Link
    overlap: bool
    update: str


def check(optimizer: Any, model: nn.Module | None, options: dict[str, Any], comm: Comm) -> Checked:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer instance, got {type(optimizer).__name__}")
    if hasattr(optimizer, "_built"):
        raise TypeError("optimizer: expected a plain optimizer, got a ZeroOptimizer. Wrap once.")
    ways = {name: options[name] for name in ("resident", "gradients", "step_in_backward")}
    plan = make_plan(options["stage"], options["offload"], comm.size, **ways)
    dtype = options["param_dtype"]
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"param_dtype: expected None, torch.bfloat16, torch.float16 or torch.float32, got {dtype!r}")
    if not isinstance(options["overlap"], bool):
        raise ValueError(f"overlap: expected True or False, got {options['overlap']!r}")
    check_bucket_mb(options["bucket_mb"])
    check_update(options["update"])
    check_model(model)
    if plan.params.sharded and model is None:
        raise ValueError("model: stage 3 shards the parameters of a module, got None. Pass ZeroOptimizer(optimizer, model).")
    entries, device = _entries(optimizer, model, plan)
    if model is not None:
        Recipes(model).check(model)
        for name, buffer in model.named_buffers() if comm.size > 1 else []:
            if buffer.layout is not torch.strided:
                raise NotImplementedError(
                    f"buffer '{name}': expected a dense buffer, which rank 0 copies to all ranks, got layout {buffer.layout}. "
                    "Keep it as a plain attribute of the module."
                )
    limit = max(int(options["bucket_mb"] * 2**20), 1)
    if plan.params.sharded and model is not None:
        specs = find_units(model, options["units"], limit, dtype)
    else:
        specs = [UnitSpec("bucket", None, [(e.name, e.param) for e in entries])]
    for entry in entries:
        check_compute_dtype(entry.name, entry.param, dtype)
    classes = options["units"] if plan.params.sharded else None
    rule = make_rule(optimizer, options["moments"], options["update"])
    return Checked(
        plan, rule, entries, specs, dtype, classes, limit, device, link_for(device), options["overlap"], options["update"]
    )


def _entries(optimizer: torch.optim.Optimizer, model: nn.Module | None, plan: Plan) -> tuple[list[Entry], torch.device]:
    names = names_of(model, optimizer.param_groups)
    groups: dict[nn.Parameter, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p in groups:
                raise ValueError(f"parameter '{names[p]}': expected once in the optimizer's param groups, got it twice.")
            groups[p] = group
    if not any(p.requires_grad for p in groups):
        raise ValueError("optimizer: expected at least one parameter that requires a gradient, got none.")
    device = device_of(groups)
    owned = set(model.parameters()) if model is not None else set()
    wanted = list(groups)
    if plan.params.sharded and model is not None:
        for p in groups:
            if p not in owned:
                raise ValueError(
                    f"parameter '{names[p]}': expected a parameter of the model, got one that it does not have. Build the "
                    "optimizer from this model's parameters()."
                )
        wanted = list(model.parameters())
    elif model is not None and owned.isdisjoint(groups):
        raise ValueError(
            f"model: expected the module whose parameters the optimizer has, got a {type(model).__name__} that owns none of "
            "them. Build the optimizer from this model's parameters(), not from those of a copy."
        )
    for p in wanted:
        if _trained(p):
            gc.collect()  # of an optimizer that nobody holds, cycles may be left
        if _trained(p):
            raise ValueError(
                f"parameter '{names[p]}': expected one that no ZeroOptimizer trains, got one that another trains already. Call "
                "its remove_hooks() first, on every rank."
            )
        if p not in groups and p.dtype not in DTYPES:
            raise TypeError(
                f"parameter '{names[p]}': stage 3 shards every parameter of the model, expected float32, bfloat16 or float16, "
                f"got {p.dtype}. Register it as a buffer, or use stage=2."
            )
        check_parameter(names[p], p, device, model is not None and p in owned)
        if p not in groups and p.requires_grad:
            raise ValueError(NOT_TRAINED.format(name=names[p]))
    _check_memory({p: names[p] for p in (*wanted, *(model.parameters() if model is not None else ()))})
    table = Table()
    return [table.add(names[p], p, groups.get(p)) for p in wanted], device


def _trained(p: nn.Parameter) -> bool:
    owner = TRAINED.get(p)
    return owner is not None and owner() is not None


def _check_memory(names: dict[nn.Parameter, str]) -> None:
    """Raises ValueError where two parameters, of which one is trained, lie on the same memory: each would get its own."""
    whole = [p for p in names if type(p) is nn.Parameter and not p.is_meta and p.numel() and is_dense(p)]
    reached, last = 0, None
    for p in sorted(whole, key=lambda p: (p.device.type, p.data_ptr())):
        start = p.data_ptr()
        if last is not None and last.device == p.device and start < reached and (last.requires_grad or p.requires_grad):
            raise ValueError(
                f"parameters '{names[last]}' and '{names[p]}' are two parameters on the same memory. Tie them by using one "
                "parameter twice (b.weight = a.weight), or give each its own (a.weight.detach().clone())."
            )
        if last is None or last.device != p.device or start + p.nbytes > reached:
            reached, last = start + p.nbytes, p


def describe(checked: Checked, optimizer: torch.optim.Optimizer, model: nn.Module | None, options: dict[str, Any]) -> list[str]:
    """One line for each thing that ranks must agree on, the most telling first."""
    lines = [f"torch {torch.__version__}", f"optimizer {type(optimizer).__name__}"]
    shown = {**options, "units": sorted(c.__qualname__ for c in options["units"]) if options["units"] else None}
    lines += [f"option {name}={value!r}" for name, value in shown.items()]
    lines.append(f"{len(checked.entries)} parameters, states of {len(optimizer.state)}")
    for entry in checked.entries:
        p = entry.param
        lines.append(f"parameter '{entry.name}' {tuple(p.shape)} {p.dtype} requires_grad={p.requires_grad}")
    for number, group in enumerate(optimizer.param_groups):
        values = {k: told(v) for k, v in group.items() if k not in ("params", "param_names")}
        lines.append(f"group {number}: {len(group['params'])} parameters, {values}")
    for name, buffer in model.named_buffers() if model is not None else []:
        lines.append(f"buffer '{name}' {tuple(buffer.shape)} {buffer.dtype}")
    return lines


def compare(shared: list[tuple[bool, list[str]]], comm: Comm) -> None:
    for rank, (failed, lines) in enumerate(shared):
        if failed:
            raise RankError(f"rank {rank} could not build its ZeroOptimizer: {lines[0]}")
    first = shared[0][1]
    for rank, (_, lines) in enumerate(shared):
        if lines == first:
            continue
        for ours, theirs in zip(first, lines, strict=False):
            if ours != theirs:
                raise ValueError(
                    f"ranks differ: expected on every rank, as on rank 0, [{ours}], got on rank {rank} [{theirs}]."
                )
        raise ValueError(f"ranks differ: rank 0 describes {len(first)} things, rank {rank} {len(lines)}.")
