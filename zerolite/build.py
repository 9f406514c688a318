"""From an optimizer and a model to buckets, hooks and a plan: every check first, on every rank, then every change."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zerolite.bucket import Bucket, Entry, rest_dtype
from zerolite.comm import Comm
from zerolite.comm.lane import LaneSpec
from zerolite.comm.shared import SharedComm, share_host
from zerolite.grads import Grads
from zerolite.hooks import Hooks
from zerolite.host import identity as host_identity
from zerolite.host import trim_heap, usable_cores
from zerolite.kernels import set_threads
from zerolite.meta import Recipes
from zerolite.partition import DTYPES, UnitSpec, beside, check_model, check_parameter, cut_buckets, find_units, names_of
from zerolite.placement import Plan, Setting, Widths, make_plan, with_rows
from zerolite.reducer import Reducer
from zerolite.unit import Schedule, Unit
from zerolite.update import Rule, make_rule
from zerolite.values import Materialise, copy_the_rest
from zerolite.whole import WholeStateDict

#: What a model was built into, for load_pretrained(). Neither side keeps the other alive.
BUILT: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Built]] = weakref.WeakKeyDictionary()


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


@dataclass
class Built:
    """The parts of a ZeroOptimizer."""

    comm: Comm
    rule: Rule
    entries: list[Entry]
    buckets: list[Bucket]
    reducer: Reducer
    grads: Grads
    hooks: Hooks
    schedule: Schedule | None  # None: parameters rest whole
    model: nn.Module | None
    checked: Checked
    owner: dict[int, Unit]  # id(bucket) -> unit
    here: int  # ranks on this host

    def __post_init__(self) -> None:
        self._slots: list[tuple[dict[str, Any], str, Entry]] = []
        self._params: set[int] = set()
        known = {entry.param: entry for entry in self.entries}
        for module in self.model.modules() if self.model is not None else []:
            for name, p in module._parameters.items():
                if p in known:
                    self._slots.append((module._parameters, name, known[p]))

    @property
    def params(self) -> set[int]:
        """id of every parameter that has an entry (entries keep them alive)."""
        if len(self._params) != len(self.entries):
            self._params = {id(entry.param) for entry in self.entries}
        return self._params

    @property
    def plan(self) -> Plan:
        """The plan with the present buckets."""
        rows = []
        numbers: dict[int, int] = {}  # units from 1, the root is 0
        for unit in self.owner.values():
            numbers.setdefault(id(unit), 0 if unit.is_root else len(numbers) + 1)
        for bucket in self.buckets:
            layout, param, rest, trained = bucket.row
            widths = Widths(param, rest + self.rule.width, self.rule.group_width, rest)
            rows.append((layout, widths, trained, numbers.get(id(self.owner.get(id(bucket))), 0)))
        covered = {entry.param for entry in self.entries if entry.bucket is not None}
        outside = [entry.param for entry in self.entries]
        shared = isinstance(self.comm, SharedComm)
        setting = Setting(here=self.here, shared=shared, beside=beside(self.model, outside, covered, self.checked.dtype))
        named = self.model.named_parameters() if self.model is not None and self.schedule is not None else ()
        return with_rows(self.checked.plan, rows, setting, [name for name, _ in named])

    def check_replaced(self) -> None:
        """Raises RuntimeError where the model or a parameter no longer uses the memory that is updated."""
        for parameters, name, entry in self._slots:
            if parameters.get(name) is not entry.param:
                raise RuntimeError(
                    f"parameter '{entry.name}': expected the parameter that the optimizer was built with, got another one. "
                    "Build ZeroOptimizer after the model is changed, or write values with p.copy_(...)."
                )
        for bucket in self.buckets:
            for entry in bucket.replaced():
                raise RuntimeError(
                    f"parameter '{entry.name}': its storage was replaced (p.data = ..., model.to(...), a new dtype or device). "
                    "Do this before ZeroOptimizer is built, or write values with p.copy_(...)."
                )

    def add_group(self, group: dict[str, Any], number: int) -> list[Entry]:
        """Entries for the parameters of a new param group."""
        names = names_of(self.model, [])
        known = {entry.param: entry for entry in self.entries}
        added: list[Entry] = []
        for k, p in enumerate(group["params"]):
            name = names.get(p, f"group {number} parameter {k}")
            check_parameter(name, p, self.checked.device)
            entry = known.get(p)
            if entry is None:
                if self.schedule is not None:
                    raise ValueError(f"parameter '{name}': expected a parameter of the model, got one that it does not have.")
                entry = Entry(name, p, group)
                entry.index = len(self.entries)
                self.entries.append(entry)
            entry.group = group
            added.append(entry)
        return added


def build(optimizer: Any, model: nn.Module | None, options: dict[str, Any], comm: Comm) -> Built:
    """Checks, compares ranks, then makes buckets and registers hooks."""
    checked: Checked | None = None
    problem: Exception | None = None
    try:
        checked = _check(optimizer, model, options, comm)
        description = _describe(checked, optimizer, model, options)
    except Exception as error:  # told to the other ranks, then raised
        problem, description = error, [f"{type(error).__name__}: {error}"]
    shared = comm.share((problem is not None, description), "set-up comparison")
    hosts = comm.share(host_identity(), "set-up hosts")
    _share_cores(hosts)
    if problem is not None:
        raise problem
    assert checked is not None
    _compare(shared, comm)
    here = sum(host == host_identity()[0] for host, _ in hosts)
    return _make(checked, model, share_host(comm, hosts), here)


def _share_cores(hosts: list[tuple[str, int]]) -> None:
    """Kernel threads: this process's part of the cores, whatever OMP_NUM_THREADS says; the user's setting wins."""
    host, _ = host_identity()
    here = {process for other, process in hosts if other == host}
    if "ZEROLITE_THREADS" not in os.environ:
        set_threads(max(usable_cores() // len(here), 1))


def _check(optimizer: Any, model: nn.Module | None, options: dict[str, Any], comm: Comm) -> Checked:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer instance, got {type(optimizer).__name__}")
    if hasattr(optimizer, "_built"):
        raise TypeError("optimizer: expected a plain optimizer, got a ZeroOptimizer. Wrap once.")
    plan = make_plan(options["stage"], options["offload"], comm.size)
    dtype = options["param_dtype"]
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"param_dtype: expected None, torch.bfloat16, torch.float16 or torch.float32, got {dtype!r}")
    if not options["bucket_mb"] > 0:
        raise ValueError(f"bucket_mb: expected more than 0, got {options['bucket_mb']!r}")
    check_model(model)
    if plan.params.sharded and model is None:
        raise ValueError("model: stage 3 shards the parameters of a module, got None. Pass ZeroOptimizer(optimizer, model).")
    entries, device = _entries(optimizer, model, plan)
    if model is not None:
        Recipes(model).check(model)
    if plan.params.sharded and model is not None:
        specs = find_units(model, options["units"])
    else:
        specs = [UnitSpec("bucket", None, [(e.name, e.param) for e in entries])]
    if dtype is not None:
        for entry in entries:
            if torch.finfo(entry.param.dtype).bits < torch.finfo(dtype).bits or (
                entry.param.dtype != dtype and entry.param.dtype != torch.float32
            ):
                raise ValueError(
                    f"parameter '{entry.name}': param_dtype={dtype} expects float32 parameters (or its own dtype), got "
                    f"{entry.param.dtype}."
                )
    limit = max(int(options["bucket_mb"] * 2**20), 1)
    classes = options["units"] if plan.params.sharded else None
    return Checked(plan, make_rule(optimizer, options["moments"]), entries, specs, dtype, classes, limit, device)


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
    device = next((p.device for p in groups if not p.is_meta), torch.device("cpu"))
    owned = set(model.parameters()) if model is not None else set()
    wanted = list(groups)
    if plan.params.sharded and model is not None:
        for p in groups:
            if p not in owned:
                raise ValueError(f"parameter '{names[p]}': expected a parameter of the model, got one that it does not have.")
        wanted = list(model.parameters())
    for p in wanted:
        check_parameter(names[p], p, device, model is not None and p in owned)
        if p not in groups and p.requires_grad:
            raise ValueError(
                f"parameter '{names[p]}': stage 3 shards every parameter of the model, and this one requires a gradient but is "
                "not in the optimizer. Add it to a param group or freeze it with requires_grad_(False)."
            )
    entries = [Entry(names[p], p, groups.get(p)) for p in wanted]
    for index, entry in enumerate(entries):
        entry.index = index
    return entries, device


def _describe(
    checked: Checked, optimizer: torch.optim.Optimizer, model: nn.Module | None, options: dict[str, Any]
) -> list[str]:
    """One line for each thing that ranks must agree on, the most telling first."""
    lines = [f"torch {torch.__version__}", f"optimizer {type(optimizer).__name__}"]
    shown = {**options, "units": sorted(c.__qualname__ for c in options["units"]) if options["units"] else None}
    lines += [f"option {name}={value!r}" for name, value in shown.items()]
    lines.append(f"{len(checked.entries)} parameters")
    for entry in checked.entries:
        p = entry.param
        lines.append(f"parameter '{entry.name}' {tuple(p.shape)} {p.dtype} requires_grad={p.requires_grad}")
    for number, group in enumerate(optimizer.param_groups):
        values = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        lines.append(f"group {number}: {len(group['params'])} parameters, {values}")
    for name, buffer in model.named_buffers() if model is not None else []:
        lines.append(f"buffer '{name}' {tuple(buffer.shape)} {buffer.dtype}")
    return lines


def _compare(shared: list[tuple[bool, list[str]]], comm: Comm) -> None:
    for rank, (failed, lines) in enumerate(shared):
        if failed:
            raise RuntimeError(f"rank {rank} could not build its ZeroOptimizer: {lines[0]}")
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


def _make(checked: Checked, model: nn.Module | None, comm: Comm, here: int) -> Built:
    plan, entries = checked.plan, checked.entries
    reducer = Reducer(plan, comm, checked.device)
    asleep = {p: p.dtype for p in model.parameters() if p.is_meta} if model is not None else {}
    by_param = {entry.param: entry for entry in entries}
    buckets: list[Bucket] = []
    units: list[Unit] = []
    owner: dict[int, Unit] = {}
    for spec in checked.specs:
        members = [by_param[p] for _, p in spec.params if plan.params.sharded or p.requires_grad]
        made = _cut(spec.name, members, checked, comm)
        unit = Unit(spec.name, made, spec.module is None)
        owner.update({id(bucket): unit for bucket in made})
        unit.release()
        units.append(unit)
        buckets += made
    if model is not None and (asleep or any(buffer.is_meta for buffer in model.buffers())):
        modules = {spec.module for spec in find_units(model, checked.classes) if spec.module is not None}
        fresh = [b for b in buckets if b.entries[0].param in asleep]
        Materialise(model, asleep, entries, comm).run(fresh, modules)
    copy_the_rest(entries, checked.dtype, model, comm)
    _train([b for b in buckets if any(e.param.requires_grad for e in b.entries)], checked, reducer)
    built: Built
    schedule = Schedule(units, lambda: reducer.active, reducer.enter) if plan.params.sharded else None
    on_collected: Callable[[Entry], None] = lambda entry: None  # noqa: E731
    if schedule is not None:
        reducer.at_end.append(schedule.release_all)
        on_collected = lambda entry: schedule.collected(owner[id(entry.bucket)])  # noqa: E731
    grads = Grads(reducer, entries, on_collected, lambda late: late_buckets(built, late))
    built = Built(comm, checked.rule, entries, buckets, reducer, grads, Hooks(), schedule, model, checked, owner, here)
    for entry in entries:
        if entry.bucket is not None and entry.bucket.trained:
            _listen(built, entry)
    if schedule is not None and model is not None:
        _follow(built, model, schedule, units, checked.specs)
    trim_heap()  # the parameters have moved
    if model is not None:
        BUILT[model] = weakref.ref(built)
    return built


def _cut(name: str, members: list[Entry], checked: Checked, comm: Comm) -> list[Bucket]:
    """Buckets of one unit, as partition.cut_buckets says."""
    buckets: list[Bucket] = []
    for spec in cut_buckets([(entry.name, entry.param) for entry in members], comm.size, checked.dtype, checked.limit):
        part = [members[k] for k in spec.members]
        buckets.append(Bucket(f"{name} {len(buckets)}", spec.layout, part, checked.plan, comm, spec.dtype, spec.trained))
    return buckets


def _train(buckets: list[Bucket], checked: Checked, reducer: Reducer) -> None:
    """States, gradient buffers and lanes for buckets, which go out last first."""
    if not buckets:
        return
    order = buckets[::-1]
    plan = checked.plan
    specs = [
        LaneSpec(b.layout.numel, b.full.dtype, plan.grads.sharded, plan.scatters(b.layout, b.full.element_size()))
        for b in order
    ]
    lanes = reducer.comm.lanes(specs, checked.device)
    for bucket, lane in zip(order, lanes, strict=True):
        bucket.train(checked.rule, lane, reducer.suspect)
    reducer.add(buckets)


def _listen(built: Built, entry: Entry) -> None:
    """The handle and the hook of a trained parameter."""
    built.grads.make_handle(entry)
    if entry.param.requires_grad:
        built.hooks.on_gradient(entry, built.grads.arrive)


def _follow(built: Built, model: nn.Module, schedule: Schedule, units: list[Unit], specs: list[UnitSpec]) -> None:
    """Hooks that gather and release."""
    hooks, inside = built.hooks, {}
    root = next((unit for unit in units if unit.is_root), None)
    for spec, unit in zip(specs, units, strict=True):
        if spec.module is not None:
            hooks.on_unit(spec.module, unit, schedule)
            inside.update({id(m): unit for m in spec.module.modules()})
    if root is not None:
        hooks.on_unit(model, root, schedule)
    hooks.on_model(model, schedule)
    unit_modules = {id(spec.module) for spec in specs}
    for module in model.modules():
        home = inside.get(id(module), root)
        if home is not None and module is not model and id(module) not in unit_modules and module._parameters:
            hooks.on_part(module, home, schedule)
        if root is not None and home is not root and id(module) in unit_modules:
            tied = any(built_entry_is(built, p, root) for p in module.parameters())
            if tied:
                hooks.on_part(module, root, schedule)
    WholeStateDict(schedule, built.entries, built.owner).register(hooks, model)


def built_entry_is(built: Built, p: nn.Parameter, unit: Unit) -> bool:
    """Whether a parameter travels with `unit`."""
    return any(p is entry.param for bucket in unit.buckets for entry in bucket.entries)


def late_buckets(built: Built, entries: list[Entry]) -> None:
    """States, handles and hooks for parameters that are trained from now on (every rank calls it)."""
    fresh = [entry for entry in entries if entry.bucket is None]
    made = _cut(f"late {len(built.buckets)}", fresh, built.checked, built.comm)
    built.buckets += made
    affected = dict.fromkeys([*made, *(entry.bucket for entry in entries if entry.bucket is not None)])
    _train([bucket for bucket in affected if not bucket.trained], built.checked, built.reducer)
    for entry in entries:
        if entry.handle is None:
            _listen(built, entry)


__all__ = ["Built", "Checked", "build", "late_buckets", "rest_dtype"]
