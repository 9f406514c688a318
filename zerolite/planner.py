"""Plans before anything is allocated: from shapes to bytes, what fits, and which plan that fits is the fastest.

A plan's rows come from the functions that lay out a ZeroOptimizer's buckets (partition.find_units, cut_buckets), so planned
bytes at rest are the live ones. The cost of a step is modelled from measured rates (rates.py); docs/plan.md has the formulas.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from zerolite.cost import seconds, show_ms
from zerolite.dtypes import rest_dtype
from zerolite.moments import MOMENTS
from zerolite.options import (
    Keeper,
    check_bucket_mb,
    check_gradients,
    check_loop,
    check_resident,
    check_run,
    check_update,
    feed_size,
    is_auto,
)
from zerolite.partition import (
    DTYPES,
    UnitSpec,
    beside,
    check_compute_dtype,
    check_dtype,
    check_model,
    check_owner,
    check_shape,
    check_trained,
    cut_buckets,
    find_units,
    names_of,
)
from zerolite.placement import Plan, Row, Setting, Widths, choices, make_plan, with_rows
from zerolite.rates import Rates, rates
from zerolite.shapes import activations, model_of, parse_bytes
from zerolite.update import make_rule

DEFAULT_BUCKET_MB = 25.0


class DoesNotFit(ValueError):
    """A plan needs more memory than there is."""


@dataclass(frozen=True)
class Limits:
    """Bytes that may be used: of each rank's device, and of one host by all its ranks. None: not limited."""

    device: int | None = None
    host: int | None = None

    def missing(self, plan: Plan) -> dict[str, int]:
        """What a step of `plan` lacks at its peak, by memory; empty where it fits."""
        needs = {"device": (plan.used("device"), self.device), "host": (plan.host_peak, self.host)}
        return {home: need - limit for home, (need, limit) in needs.items() if limit is not None and need > limit}


@dataclass(frozen=True)
class Candidate:
    """A plan among its alternatives."""

    plan: Plan
    moments: str
    seconds: float  # of a step, beside the model's own forward and backward, as modelled
    missing: dict[str, int]

    @property
    def label(self) -> str:
        return self.plan.label + (f", moments={self.moments!r}" if self.moments != "fp32" else "")


class Question:
    """A model and everything that its plans have in common."""

    def __init__(
        self,
        model: nn.Module | None,
        params: list[tuple[str, nn.Parameter]],
        optimizer: torch.optim.Optimizer | None,
        options: dict[str, Any],
        world: int,
        setting: Setting,
        device: int | None = None,
    ) -> None:
        self.device = device  # bytes of a rank's device, for resident="auto" and gradients="auto"
        self.model = model
        self.params = params
        self.optimizer = optimizer
        self.options = {"resident": 0.0, "gradients": "auto", "step_in_backward": False, **options}
        self.world = world
        self.setting = setting
        self._cuts: dict[tuple[bool, int], list[tuple[int, Any]]] = {}

    def _cut(self, sharded: bool, world: int) -> list[tuple[int, Any]]:
        """Unit and specification of each bucket."""
        key = (sharded, world)
        if key not in self._cuts:
            whole = self.model.named_parameters() if sharded and self.model is not None else self.params
            for name, p in whole:
                if p.requires_grad or sharded:
                    check_dtype(name, p)
            units = [UnitSpec("bucket", None, [(name, p) for name, p in self.params if p.requires_grad])]
            limit = max(int(self.options["bucket_mb"] * 2**20), 1)
            if sharded and self.model is not None:
                units = find_units(self.model, self.options["units"], limit, self.options["param_dtype"])
            self._cuts[key] = [
                (0 if unit.module is None else number + 1, spec)
                for number, unit in enumerate(units)
                for spec in cut_buckets(unit.params, world, self.options["param_dtype"], limit)
            ]
        return self._cuts[key]

    def plan(self, stage: object, offload: object, moments: str, world: int | None = None) -> Plan:
        """One plan. Raises ValueError for a stage, offload or moments that do not exist or do not go together."""
        resident, near = (self.options[name] for name in ("resident", "gradients")) if offload == "states" else (0.0, "auto")
        if resident == "auto" or (near == "auto" and offload == "states"):
            return self._fullest(stage, offload, moments, world)
        once = self.options["step_in_backward"]
        plan = make_plan(stage, offload, self.world if world is None else world, resident, near, once)
        keeper = Keeper(plan.resident, sum(p.numel() for _, p in self.params if p.requires_grad))
        if plan.params.sharded and self.model is None:
            raise ValueError(
                "model: stage 3 shards the parameters of a module, got None. Pass ZeroOptimizer(optimizer, model)."
            )
        if plan.params.sharded and self.model is not None:
            check_trained(self.model, {p for _, p in self.params})
        if not isinstance(moments, str) or moments not in MOMENTS:
            raise ValueError(f"moments: expected one of {', '.join(map(repr, MOMENTS))}, got {moments!r}")
        rule: Any = MOMENTS[moments]
        width, group = rule.width, rule.group_width
        setting = self.setting
        if self.optimizer is not None:
            rule = make_rule(self.optimizer, moments, self.options["update"])
            width, group = rule.width, rule.group_width
            if not rule.threaded:
                setting = replace(setting, stream=False, feed=feed_size("host", False))
        rows = []
        for unit, spec in self._cut(plan.params.sharded, plan.size):
            rest = rest_dtype(spec.dtype).itemsize if spec.trained and spec.dtype != torch.float32 else 0
            widths = Widths(spec.dtype.itemsize, rest + width, group, rest)
            rows.append(Row(spec.layout, widths, spec.trained, unit, spec.trained and keeper.take(spec.layout)))
        params = [p for _, p in self.params]
        covered = {p for p in params if p.requires_grad}
        if plan.params.sharded and self.model is not None:
            covered = set(self.model.parameters())
        outside = beside(self.model, params, covered, self.options["param_dtype"])
        names = [name for name, _ in self.model.named_parameters()] if plan.params.sharded and self.model is not None else []
        return with_rows(plan, rows, replace(setting, beside=outside), names)

    def _fullest(self, stage: object, offload: object, moments: str, world: int | None) -> Plan:
        """What is left to the plan and the device has room for: gradients first, then the largest part of the states, in 16ths.
        Where activations were not measured, half of what the plan leaves is left to them."""
        part, near = self.options["resident"], self.options["gradients"]

        def at(part: float, near: str) -> Plan:
            return replace_options(self, resident=part, gradients=near).plan(stage, offload, moments, world)

        best = bare = at(0.0 if part == "auto" else part, "host" if near == "auto" else near)
        room = self.device - bare.used("device") if self.device is not None and self.setting.device != "cpu" else 0
        room = room if self.setting.activations is not None else room // 2
        if near == "auto" and room > 0:
            other = at(bare.resident, "device")
            best = other if other.used("device") - bare.used("device") <= room else bare
        for step in range(1, 17) if part == "auto" and room > 0 else ():
            other = at(step / 16, best.grads.home)
            if other.used("device") - bare.used("device") > room:
                break
            best = other
        return best

    def candidates(
        self, ways: list[tuple[int, str | None]], kinds: Iterable[str], limits: Limits, found: Rates, world: int | None = None
    ) -> list[Candidate]:
        """Every combination, the fastest first (of equals the lower stage, the more exact moments)."""
        plans = [(self.plan(stage, offload, kind, world), kind) for kind in kinds for stage, offload in ways]
        rated = [Candidate(plan, kind, seconds(plan, kind, found), limits.missing(plan)) for plan, kind in plans]
        return sorted(rated, key=lambda candidate: candidate.seconds)

    def alternatives(self, ways: list[tuple[int, str | None]], limits: Limits, found: Rates, world: int) -> Iterator[Candidate]:
        """Candidates of every storage of moments and, where that is a choice, with gradients on either side."""
        sides = {"host": ways, "device": [way for way in ways if way[1] == "states"]}
        for gradients, some in sides.items():
            yield from replace_options(self, gradients=gradients).candidates(some, self.kinds, limits, found, world)

    @property
    def whole(self) -> bool:
        """Whether parameters cannot be sharded: there is no model, or stage 3 refuses one of its parameters."""
        if self.model is None:
            return True
        known = {p for _, p in self.params}
        return not all(p.dtype in DTYPES and (p in known or not p.requires_grad) for p in self.model.parameters())

    @property
    def kinds(self) -> list[str]:
        """Storages of moments that the optimizer can have."""
        adam = self.optimizer is None or type(self.optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        plain = adam and not any(g.get("amsgrad") for g in (self.optimizer.param_groups if self.optimizer else []))
        return list(MOMENTS) if plain else ["fp32"]


def replace_options(question: Question, **changes: Any) -> Question:
    """The same question with other options."""
    other = object.__new__(Question)
    other.__dict__.update(question.__dict__, options={**question.options, **changes})
    return other


# ---- choosing


def choose(
    question: Question, stage: object, offload: object, moments: str, limits: Limits, found: Rates | None = None
) -> Plan:
    """The plan that was asked for, or the fastest that fits. Raises ValueError, with the nearest that fit, where none does.

    stage "auto", offload "auto" and moments "auto" leave each to the planner.
    """
    free = is_auto(stage), offload == "auto", moments == "auto"
    if not free[1]:
        check_gradients(question.options["gradients"], offload)
        check_resident(question.options["resident"], offload)
    if not any(free):
        plan = question.plan(stage, offload, moments)
        missing = limits.missing(plan)
        if missing:
            raise DoesNotFit(_refusal(question, Candidate(plan, moments, 0.0, missing), limits, found or rates()))
        return plan
    kinds = question.kinds if free[2] else [moments]
    once = question.options["step_in_backward"] is True
    ways = choices(True if free[1] else offload, question.setting.device, question.whole, once)
    ways = [way for way in ways if free[0] or way[0] == stage]
    if not ways:
        make_plan(stage, None if free[1] else offload, question.world, step_in_backward=once)  # raises for what does not exist
        raise ValueError(f"stage={stage!r}, offload={offload!r}: expected a combination that exists, and a model for stage 3.")
    found = found or rates()
    ranked = question.candidates(ways, kinds, limits, found)
    best = next((candidate for candidate in ranked if not candidate.missing), None)
    if best is None:
        least = min(ranked, key=lambda candidate: sum(candidate.missing.values()))
        raise DoesNotFit(_refusal(question, least, limits, found))
    return replace(best.plan, reasons=tuple(explain(best, ranked, limits)))


def explain(best: Candidate, ranked: list[Candidate], limits: Limits) -> list[str]:
    """Why `best` was chosen, and why each other was passed over."""
    limit = " and ".join(
        f"{value:,} bytes of {home}" for home, value in (("device", limits.device), ("host", limits.host)) if value is not None
    )
    among = "" if len({other.moments for other in ranked}) == 1 else f" with {best.moments} moments"
    lines = [
        f"chosen: {best.label}, the fastest{among} that fits {limit or '(no limit was given)'}: {show_ms(best.seconds)} a step"
    ]
    lines[0] += " beside forward and backward, as modelled from measured rates"
    if best.plan.setting.device != "cpu":
        lines[0] += " of the host and assumed ones of the GPU"
    for other in ranked:
        if other is best:
            continue
        if other.missing:
            why = ", ".join(f"{value:,} bytes of {home} memory missing" for home, value in other.missing.items())
        elif other.seconds > best.seconds:
            why = f"slower, {show_ms(other.seconds)}"
        elif other.seconds < best.seconds:  # the caller wants exact moments where they fit
            why = f"{show_ms(other.seconds)}, but its moments are rounded"
        else:
            why = "not faster"
        lines.append(f"passed over: {other.label}: {why}")
    return lines


def _refusal(question: Question, asked: Candidate, limits: Limits, found: Rates) -> str:
    """What is missing, and the three nearest plans that fit: fewest changes first, then the fastest."""
    plan = asked.plan
    need = ", ".join(
        f"{home} memory: expected at most {limit:,} bytes a {'rank' if home == 'device' else 'host'}, got a peak of "
        f"{limit + asked.missing[home]:,} ({asked.missing[home]:,} missing)"
        for home, limit in (("device", limits.device), ("host", limits.host))
        if limit is not None and home in asked.missing
    )
    near: list[tuple[tuple[float, ...], str]] = []
    ways = choices(True, question.setting.device, question.whole)
    sides = [(replace_options(question, step_in_backward=False), ways)]
    if plan.step_in_backward:
        sides.append((question, choices(True, question.setting.device, question.whole, True)))
    for doubling in range(9):  # more ranks only where these do not do
        world = question.world << doubling
        for other in (one for asked_for, some in sides for one in asked_for.alternatives(some, limits, found, world)):
            changed = plan.changes(other.plan) + (other.moments != asked.moments) + doubling
            if not other.missing:
                hosts = f"{world // question.setting.here} hosts (ranks_per_host={question.setting.here})"
                more = f" with {world} ranks on {hosts}" if doubling else ""
                near.append(((changed, other.seconds), f"{other.label}{more}"))
        if len(near) >= 3:
            break
    nearest = "; ".join(text for _, text in sorted(near)[:3])
    cure = f"The nearest that fit: {nearest}." if near else "No stage or offload fits, nor up to 256 times as many hosts."
    return f"{asked.label} on {plan.size} rank(s) does not fit: {need}. {cure}"


# ---- the user's function


def question_of(
    source: Any,
    *,
    world: int = 1,
    ranks_per_host: int | None = None,
    device: str = "cpu",
    param_dtype: torch.dtype | None = None,
    units: Iterable[type[nn.Module]] | None = None,
    bucket_mb: float = DEFAULT_BUCKET_MB,
    optimizer: torch.optim.Optimizer | None = None,
    batch: Any = None,
    micro_batches: int = 1,
    clip: bool = True,
    step_in_backward: bool = False,
    resident: float | str = 0.0,
    gradients: str = "auto",
    update: str = "auto",
    device_bytes: int | None = None,
) -> tuple[Question, str]:
    """The question about a model, config, name, path or count (shapes.model_of), and what that is."""
    here = world if ranks_per_host is None else ranks_per_host
    check_run(world, here, device)
    check_loop(step_in_backward, micro_batches, clip)
    if param_dtype is not None and param_dtype not in DTYPES:
        raise ValueError(f"param_dtype: expected None, torch.bfloat16, torch.float16 or torch.float32, got {param_dtype!r}")
    check_bucket_mb(bucket_mb)
    check_update(update)
    model, what = model_of(source)
    check_model(model)
    params: list[tuple[str, nn.Parameter]] = list(model.named_parameters())
    if optimizer is not None:
        check_owner(optimizer, {p for _, p in params})
        names = names_of(model, optimizer.param_groups)
        params = [(names[p], p) for group in optimizer.param_groups for p in group["params"]]
    for name, p in params:
        check_shape(name, p)
        if p.requires_grad:
            check_compute_dtype(name, p, param_dtype)
    shared = device == "cpu" and here > 1 and os.environ.get("ZEROLITE_SHARED", "1") != "0"
    saved = None if batch is None else activations(model, batch, param_dtype)
    setting = Setting(here, shared, device, update != "host", micro_batches, bool(clip), saved, feed=feed_size(update, True))
    classes = tuple(units) if isinstance(units, Iterable) else units  # read more than once
    options: dict[str, Any] = {"units": classes, "bucket_mb": bucket_mb, "param_dtype": param_dtype}
    options |= {"resident": resident, "gradients": gradients, "step_in_backward": step_in_backward, "update": update}
    return Question(model, params, optimizer, options, world, setting, device_bytes), what


def plan(
    source: Any,
    *,
    stage: int | str = "auto",
    offload: str | None = None,
    moments: str = "fp32",
    device: str | None = None,
    device_bytes: int | str | None = None,
    host_bytes: int | str | None = None,
    **options: Any,
) -> Plan:
    """Plans memory without allocating: plan(model or meta model or config or name or count, world=8, ...).

    Args:
        source: an nn.Module (also on the meta device), a transformers config, the path of a config.json, a name such as
            "gpt2-xl", or a number of parameters.
        stage: 0, 1, 2, 3, or "auto": the fastest that fits.
        offload: None, "states", "all" or "auto".
        moments: "fp32", "bf16", "int8", or "auto" (which may take rounded ones).
        device: "cpu" or "cuda"; by default "cuda" where device_bytes is given.
        device_bytes: limit of each rank's device memory, a number or e.g. "80G"; None: unlimited.
        host_bytes: limit of one host's memory for all its ranks.
        options: world=1, ranks_per_host=None (all on one host), param_dtype=None, units=None, bucket_mb=25.0,
            optimizer=None (AdamW), batch=None (adds activations: a tensor, a tuple of arguments or a dict of keyword
            arguments of its forward, values do not matter), micro_batches=1, clip=True, resident=0.0,
            gradients="auto" (with offload="states" on the device where device_bytes leaves room), update="auto",
            step_in_backward=False.

    Raises ValueError, with what is missing and the three nearest that fit, where the plan does not fit.
    """
    known = (question_of.__kwdefaults__ or {}).keys() - {"device", "device_bytes"}
    for name in options.keys() - known:
        raise TypeError(f"zerolite.plan: expected options of {sorted(known)}, got '{name}'")
    limits = Limits(parse_bytes(device_bytes, "device_bytes"), parse_bytes(host_bytes, "host_bytes"))
    kind = device or ("cpu" if limits.device is None else "cuda")
    if limits.device is not None and kind == "cpu":
        raise ValueError("device_bytes: expected device='cuda', got 'cpu', where all memory is the host's. Give host_bytes=...")
    question, _ = question_of(source, device=kind, device_bytes=limits.device, **options)
    return choose(question, stage, offload, moments, limits)
