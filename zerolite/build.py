"""From an optimizer and a model to buckets, hooks and a plan: every check first, on every rank, then every change."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import nn

from zerolite.average import Staging
from zerolite.bucket import Bucket
from zerolite.check import Checked, check, compare, describe
from zerolite.comm import Comm
from zerolite.comm.lane import LaneSpec
from zerolite.comm.pinned import connect
from zerolite.comm.shared import SharedComm, share_host
from zerolite.entry import TRAINED, Entry
from zerolite.grads import Grads
from zerolite.hooks import Hooks
from zerolite.host import affinity, core_share, trim_heap
from zerolite.host import identity as host_identity
from zerolite.kernels import exceeds_, set_threads
from zerolite.meta import is_left
from zerolite.options import Keeper, feed_size
from zerolite.partition import UnitSpec, beside, check_parameter, cut_buckets, find_units, names_of
from zerolite.placement import Plan, Setting, Widths, with_rows
from zerolite.reducer import Reducer
from zerolite.unit import Schedule, Unit
from zerolite.update import Rule
from zerolite.updates import Updates, make_updates
from zerolite.values import Materialise, copy_the_rest
from zerolite.whole import WholeStateDict
from zerolite.writes import check_storage

#: What a model was built into, for load_pretrained(). Neither side keeps the other alive.
BUILT: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Built]] = weakref.WeakKeyDictionary()

#: How ranks reach each other, by environment variables.
WISHES = {"ZEROLITE_SHARED": "1", "ZEROLITE_CONNECT": "auto"}


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
    updates: Updates
    staging: Staging | None  # of states in another memory than the device's
    here: int  # ranks on this host
    inside: bool = False  # of full_params()
    closed: bool = False

    def __post_init__(self) -> None:
        self._homes: list[tuple[dict[str, Any], list[str], list[Entry], list[nn.Parameter]]] = []  # a row for each module
        self._params: set[int] = set()
        known = {entry.param: entry for entry in self.entries}
        for module in self.model.modules() if self.model is not None else []:
            own = {name: known[p] for name, p in module._parameters.items() if p in known}
            self._homes.append((module._parameters, [*own], [*own.values()], [entry.param for entry in own.values()]))

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
        units = self.schedule.units if self.schedule is not None else []
        numbers = {id(unit): 0 if unit.is_root else number for number, unit in enumerate(units, 1)}
        for bucket in self.buckets:
            layout, param, rest, trained = bucket.row
            widths = Widths(param, rest + self.rule.width, self.rule.group_width, rest)
            rows.append((layout, widths, trained, numbers.get(id(self.owner.get(id(bucket))), 0), bucket.kept))
        covered = {entry.param for entry in self.entries if entry.bucket is not None}
        outside = [entry.param for entry in self.entries]
        shared = isinstance(self.comm, SharedComm) and not self.comm.pins
        link = self.checked.link
        setting = Setting(
            here=self.here,
            shared=shared,
            device=link.kind,
            slots=isinstance(self.comm, SharedComm) and self.comm.pins,
            stream=self.checked.update != "host" and self.rule.threaded,
            feed=feed_size(self.checked.update, self.rule.threaded),
            beside=beside(self.model, outside, covered, self.checked.dtype),
        )
        named = self.model.named_parameters() if self.model is not None and self.schedule is not None else ()
        return with_rows(self.checked.plan, rows, setting, [name for name, _ in named])

    def close(self) -> None:
        """Detaches from autograd and the model, when no update is under way. Parameters that rest sharded stay whole, and are
        no longer anyone's (a collective)."""
        if self.inside:
            raise RuntimeError("remove_hooks(): expected outside of `with optimizer.full_params()`, got inside.")
        if self.hooks.handles:
            self.updates.settle()
            self.grads.clear(set_to_none=True)  # handles would ask an optimizer that is gone
            if self.schedule is not None:
                self.schedule.hold()
        self.updates.close()
        self.closed = True
        self.hooks.remove()
        for entry in self.entries:
            TRAINED.pop(entry.param, None)

    def check_open(self) -> None:
        """Raises RuntimeError after remove_hooks()."""
        if self.closed:
            raise RuntimeError(
                "expected a ZeroOptimizer that is connected with its parameters, got one after remove_hooks(). Build a new one."
            )

    def settled(self) -> Built:
        """Itself, when every update under way is done."""
        self.check_open()
        self.updates.settle()
        return self

    def check_replaced(self) -> None:
        """Raises RuntimeError where the model or a parameter no longer uses the memory that is updated."""
        for parameters, names, entries, params in self._homes:
            if all(map(is_, map(parameters.get, names), params)):
                continue
            if {*map(id, params)} <= {*map(id, parameters.values())}:  # under other names, as torch's pruning makes
                continue
            entry = next(e for name, e in zip(names, entries, strict=True) if parameters.get(name) is not e.param)
            raise RuntimeError(
                f"parameter '{entry.name}': expected the parameter that the optimizer was built with, got another one. "
                "Build ZeroOptimizer after the model is changed, or write values with p.copy_(...)."
            )
        for bucket in self.buckets:
            check_storage(bucket)

    def why_not_finite(self) -> str:
        """What a warning about gradients adds where a parameter of this rank's range is not finite itself."""
        for bucket in self.buckets:
            bucket.wait()
            found = torch.zeros(1, dtype=torch.int64, device=bucket.mine.device)
            for piece in bucket.pieces:
                exceeds_(found, bucket.mine[piece.offset : piece.offset + piece.stop - piece.start], math.inf)
                if bool(found):
                    entry = bucket.entries[piece.slot]
                    modules = self.model.modules() if self.model is not None else ()
                    owners = (m for m in modules if any(p is entry.param for p in m._parameters.values()))
                    empty = any(is_left(module, entry.param) for module in owners)
                    cure = ", since meta_init(init=False): call load_pretrained()" if empty else ""
                    return f" Parameter '{entry.name}' is not finite either{cure}."
        return ""

    def add_group(self, group: dict[str, Any], number: int) -> list[Entry]:
        """Entries for the parameters of a new param group."""
        names = names_of(self.model, [])
        known = {entry.param: entry for entry in self.entries}
        named = [(names.get(p, f"group {number} parameter {k}"), p) for k, p in enumerate(group["params"])]
        for name, p in named:  # all of them before anything changes
            check_parameter(name, p, self.checked.device)
            if p not in known and self.schedule is not None:
                raise ValueError(
                    f"parameter '{name}': expected one that the model had when ZeroOptimizer was built, as stage 3 needs it, "
                    "got another. Build a new ZeroOptimizer, after remove_hooks() of this one."
                )
        added: list[Entry] = []
        for name, p in named:
            entry = known.get(p)
            if entry is None:
                entry = self.grads.table.add(name, p, group)
                self.entries.append(entry)
            entry.group = group
            added.append(entry)
        return added


@torch.inference_mode(False)  # else what it makes could be updated in that mode alone
def build(optimizer: Any, model: nn.Module | None, options: dict[str, Any], comm: Comm) -> Built:
    """Checks, compares ranks, then makes buckets and registers hooks."""
    checked: Checked | None = None
    problem: Exception | None = None
    try:
        checked = check(optimizer, model, options, comm)
        description = describe(checked, optimizer, model, options)
    except Exception as error:  # told to the other ranks, then raised
        problem, description = error, [f"{type(error).__name__}: {error}"]
    shared = comm.share((problem is not None, description), "set-up comparison")
    wishes = {name: os.environ.get(name, default) for name, default in WISHES.items()}
    told = comm.share((*host_identity(), affinity(), wishes), "set-up hosts")
    found = [row[:3] for row in told]
    hosts = [(host, process) for host, process, _ in found]
    _share_cores(found)
    if problem is not None:
        raise problem
    assert checked is not None
    compare(shared, comm)
    for name in WISHES:
        if len({row[3][name] for row in told}) > 1:  # what they call together depends on it
            raise ValueError(f"{name}: expected the same on every rank, got {[row[3][name] for row in told]}")
    here = sum(host == host_identity()[0] for host, _ in hosts)
    joined = comm
    if not checked.link.separate:
        joined = share_host(comm, hosts)
    elif checked.plan.grads.home == "host" and not checked.plan.resident:  # what stays on the devices uses the group
        joined = connect(comm, hosts, checked.link)
    built = _make(checked, model, joined, here)
    built.hooks.on_inner_step(optimizer)
    return built


def _share_cores(found: list[tuple[str, int, frozenset[int]]]) -> None:
    """Kernel threads: this process's part of the cores, whatever OMP_NUM_THREADS says; the user's setting wins.

    torchrun tells of processes of this host that are in other process groups.
    """
    host, _ = host_identity()
    cores = {process: its for other, process, its in found if other == host}
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    here = max(len(cores), int(told) if told.isdigit() else 1)
    if "ZEROLITE_THREADS" not in os.environ:
        set_threads(core_share(here, list(cores.values())))


def _make(checked: Checked, model: nn.Module | None, comm: Comm, here: int) -> Built:
    plan, entries = checked.plan, checked.entries
    reducer = Reducer(plan, comm, checked.device)
    updates, staging = make_updates(plan, checked.rule, checked.link, checked.device, comm, checked.update, checked.overlap)
    asleep = {p: p.dtype for p in model.parameters() if p.is_meta} if model is not None else {}
    by_param = {entry.param: entry for entry in entries}
    keeper = Keeper(plan.resident, sum(entry.param.numel() for entry in entries if entry.param.requires_grad))
    buckets: list[Bucket] = []
    units: list[Unit] = []
    owner: dict[int, Unit] = {}
    for spec in checked.specs:
        members = [by_param[p] for _, p in spec.params if plan.params.sharded or p.requires_grad]
        made = _cut(spec.name, members, checked, comm, keeper)
        unit = Unit(spec.name, made, spec.module is None, spec.leaf)
        owner.update({id(bucket): unit for bucket in made})
        unit.release()
        units.append(unit)
        buckets += made
    if model is not None and (asleep or any(buffer.is_meta for buffer in model.buffers())):
        specs = find_units(model, checked.classes, checked.limit, checked.dtype)
        modules = {spec.module for spec in specs if spec.module is not None}
        fresh = [b for b in buckets if b.entries[0].param in asleep]
        Materialise(model, asleep, entries, comm).run(fresh, modules)
    copy_the_rest(entries, checked.dtype, model, comm)
    _train([b for b in buckets if any(e.param.requires_grad for e in b.entries)], checked, reducer, staging)
    built: Built
    schedule = Schedule(units, lambda: reducer.active, reducer.enter, reducer.over) if plan.params.sharded else None
    on_collected: Callable[[Entry], None] | None = None
    if schedule is not None:
        reducer.at_end.append(schedule.release_all)
        on_collected = lambda entry: schedule.collected(owner[id(entry.bucket)])  # noqa: E731
    reducer.wait = updates.settle
    reducer.at_start.append(updates.settle)  # a backward writes to the gradients that updates read
    grads = Grads(reducer, entries, on_collected, lambda late: late_buckets(built, late))
    if schedule is not None:
        reducer.at_start.append(schedule.backward)
    if staging is not None:
        reducer.at_end.append(staging.leaving.clear)
    built = Built(
        comm, checked.rule, entries, buckets, reducer, grads, Hooks(), schedule, model, checked, owner, updates, staging, here
    )
    for entry in entries:
        if entry.bucket is not None and entry.bucket.trained:
            _listen(built, entry)
    if staging is not None and schedule is None and model is not None:
        _wait_in(built, model)
    if schedule is not None and model is not None:
        _follow(built, model, schedule, units, checked.specs)
    trim_heap()  # the parameters have moved
    if model is not None:
        BUILT[model] = weakref.ref(built)
    return built


def _cut(name: str, members: list[Entry], checked: Checked, comm: Comm, keeper: Keeper) -> list[Bucket]:
    """Buckets of one unit, as partition.cut_buckets says."""
    buckets: list[Bucket] = []
    for spec in cut_buckets([(entry.name, entry.param) for entry in members], comm.size, checked.dtype, checked.limit):
        part = [members[k] for k in spec.members]
        label = f"{name} {len(buckets)}"
        kept = spec.trained and keeper.take(spec.layout)
        buckets.append(Bucket(label, spec.layout, part, checked.plan, comm, spec.dtype, spec.trained, checked.link, kept))
    return buckets


def _train(buckets: list[Bucket], checked: Checked, reducer: Reducer, staging: Staging | None) -> None:
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
        bucket.train(checked.rule, lane, reducer.suspect, staging)
    if staging is not None and staging.feed is not None:
        staging.feed.reserve([(bucket.mine.numel(), bucket.mine.element_size()) for bucket in buckets if bucket.apart])
    reducer.add(buckets)


def _listen(built: Built, entry: Entry) -> None:
    """The handle and the hook of a trained parameter."""
    TRAINED[entry.param] = weakref.ref(built)
    built.grads.make_handle(entry)
    wanted = entry.param.requires_grad  # a hook stays while it changes, but cannot be registered without
    entry.param.requires_grad_(True)
    built.hooks.on_gradient(entry, built.grads)
    entry.param.requires_grad_(wanted)


def _wait_in(built: Built, model: nn.Module) -> None:
    """Every module waits for its own parameters before it runs."""
    known = {entry.param: entry.bucket for entry in built.entries if entry.bucket is not None}
    for module in model.modules():
        own = {known[p]: None for p in module._parameters.values() if p is not None and p in known}
        if own:
            built.hooks.on_use(module, list(own))


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


@torch.inference_mode(False)
def late_buckets(built: Built, entries: list[Entry]) -> None:
    """States, handles and hooks for parameters that are trained from now on (every rank calls it)."""
    fresh = [entry for entry in entries if entry.bucket is None]
    made = _cut(f"late {len(built.buckets)}", fresh, built.checked, built.comm, Keeper(0.0, 0))
    built.buckets += made
    affected = dict.fromkeys([*made, *(entry.bucket for entry in entries if entry.bucket is not None)])
    _train([bucket for bucket in affected if not bucket.trained], built.checked, built.reducer, built.staging)
    for entry in entries:
        if entry.handle is None:
            _listen(built, entry)


__all__ = ["Built", "Checked", "build", "late_buckets"]
