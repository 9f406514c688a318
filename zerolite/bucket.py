"""A bucket: parameters, gradients and states of one element range, and the verbs that move them.

    param.shard  --gather()-->  param.full  --views-->  nn.Parameter.data        ready() waits and shows them
                 <-release()--                                                   if parameters rest sharded
    p.grad  --collect()-->  Gradients  --start(), finish()-->  average           see gradient.py
    average, states  --update()-->  param.shard  --publish()-->  param.full      if parameters rest whole

Every buffer has one writer: `full` is written by gather and publish, the range that this rank updates by
update. Where parameters rest whole, `shard` is a view of its range in `full`.

Where the ranks of a host share a home (comm/shared.py), `full` is this process's private view of it and a gather
copies nothing. A home is written in `update`, when every rank is inside the same step, and by values.py likewise: what
a script writes to parameters stays in its own process, moves to a detached `mine` when it is noticed, and reaches the
home in the step.

Released parameters keep their shape, dtype and device, over a single NaN: reading one by mistake gives NaN
and writing one raises, instead of a stale value.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from zerolite.buffer import zeros
from zerolite.comm import Comm, Pending
from zerolite.comm.lane import Lane
from zerolite.comm.local import Done
from zerolite.comm.shared import Home
from zerolite.gradient import Gradients
from zerolite.kernels import join, split_
from zerolite.layout import Layout, Piece
from zerolite.meta import make_real
from zerolite.placement import Plan, Widths
from zerolite.update import Rule, State, Target


class Entry:
    """One parameter, as zerolite knows it."""

    def __init__(self, name: str, param: nn.Parameter, group: dict[str, Any] | None) -> None:
        self.name = name
        self.param = param
        self.group = group  # the user's param group; None: in the model, not in the optimizer
        self.index = -1  # position among all entries
        self.slot = -1  # position in the bucket
        self.bucket: Bucket | None = None  # None: frozen since the start, and parameters rest whole
        self.handle: Tensor | None = None  # the lazy p.grad; None: not trained yet
        self.task = -1  # the backward in which the last gradient arrived
        self.live = False  # gradients were collected since the last zero_grad or step
        self.consumed = False  # a step used them up and p.grad was not cleared since
        self.factor = 1.0  # recorded by clipping and unscaling
        self.steps = 0  # updates applied
        self.version = 0  # p._version after our own last write


class Bucket:
    """Parameters of one dtype that are gathered, exchanged and updated together."""

    name: str
    layout: Layout
    plan: Plan
    comm: Comm
    entries: list[Entry]
    full: Tensor  # 1D, layout.numel, compute dtype; without a home its storage is empty while released
    whole: bool  # `full` holds the parameters, or a gather into it is under way
    home: Home | None  # the parameters once for all ranks of a host; None: every rank has its own
    shard: Tensor  # 1D, layout.shard, compute dtype: this rank's range
    mine: Tensor  # 1D: the range this rank updates, `shard` or (states whole) `full`; a copy after outside writes to a home
    rest: Tensor  # 1D, like `mine`: int16 remainder (bf16), fp32 master (fp16), empty (fp32 or not trained)
    state: State | None  # None: not trained
    grads: Gradients | None
    views: list[Tensor]  # parameter-shaped views of `full`
    blanks: list[Tensor]  # parameter-shaped NaN, shown while released
    blank_places: list[int]  # their addresses
    pending: Pending | None  # a gather or publish into `full` under way
    published: Pending | None  # a publish into the shared home under way
    stale: bool  # this process has private pages over the shared home

    def __init__(
        self, name: str, layout: Layout, entries: list[Entry], plan: Plan, comm: Comm, dtype: torch.dtype, trained: bool
    ) -> None:
        self.name = name
        self.layout = layout
        self.plan = plan
        self.comm = comm
        self.entries = entries
        self.pending = self.published = None
        self.stale = False
        self.state = None
        self.grads = None
        device = torch.device("cpu") if entries[0].param.is_meta else entries[0].param.device
        self.rest = torch.empty(0, device=device)
        self._fill(dtype, device, trained)

    def _fill(self, dtype: torch.dtype, device: torch.device, trained: bool) -> None:
        """Takes the parameters' values, rank 0's on every rank, and makes the parameters views of `full`."""
        start, stop = self.layout.span(self.comm.rank)
        source = self.entries[0].param.dtype
        asleep = any(entry.param.is_meta for entry in self.entries)  # values.py fills all of the bucket later
        values = torch.zeros(self.layout.numel, dtype=dtype if asleep else source, device=device)
        for slot, entry in enumerate(self.entries):
            entry.bucket, entry.slot = self, slot
            if not asleep:
                self._view(values, slot).copy_(entry.param.detach())
        if not asleep:
            self.comm.broadcast_(values, f"set-up {self.name}")
        low = None
        if values.dtype != dtype:
            full, low = torch.zeros_like(values, dtype=dtype), torch.zeros_like(values, dtype=rest_dtype(dtype))
            split_(full, low, values)
            values = full
        self.full, self.whole, self.home = values, True, None
        self.shard = self.full[start:stop]
        if self.plan.states.sharded:  # else every rank writes all of it
            self.home = self.comm.home(self.layout.numel, dtype, self.plan.params.sharded)
        if self.home is not None:
            self.home.shared[start:stop] = self.shard
            self.shard, self.full = self.home.shared[start:stop], self.home.private
            self.home.publish(f"set-up {self.name}").wait()
        elif self.plan.params.sharded:
            self.shard = self.shard.clone()
        self.mine = self.shard if self.plan.states.sharded else self.full
        if low is not None and trained:
            part = low[start:stop] if self.plan.states.sharded else low
            self.rest = zeros(part.numel(), part.dtype, device).copy_(part)
        elif source != dtype and trained:
            self.rest = zeros(self.mine.numel(), rest_dtype(dtype), device)
        self.views = [self._view(self.full, slot) for slot in range(len(self.entries))]
        self.blanks = [torch.full((), float("nan"), dtype=dtype, device=device).expand(v.shape) for v in self.views]
        self.blank_places = [blank.data_ptr() for blank in self.blanks]
        for entry, view in zip(self.entries, self.views, strict=True):
            if entry.param.is_meta:
                make_real(entry.param, view)
        self._show(self.views)

    def _view(self, flat: Tensor, slot: int) -> Tensor:
        """The view of `slot` with its parameter's shape and (dense) strides."""
        p, offset = self.entries[slot].param, self.layout.slots[slot].offset
        return flat.as_strided(p.shape, dense_strides(p), flat.storage_offset() + offset)

    def _show(self, tensors: list[Tensor]) -> None:
        for entry, tensor in zip(self.entries, tensors, strict=True):
            entry.param.data = tensor
            entry.version = entry.param._version

    def train(self, rule: Rule, lane: Lane, suspect: Tensor) -> None:
        """Allocates states and gradient buffers; the remainder or master starts as the parameter is."""
        if self.rest.numel() == 0 and self.full.dtype != torch.float32:
            self.rest = zeros(self.mine.numel(), rest_dtype(self.full.dtype), self.mine.device)
            if self.full.dtype == torch.float16:
                self.rest.copy_(self.mine)
        self.state = rule.allocate(self.pieces, self.mine.numel(), self.mine.device)
        self.grads = Gradients(self.name, self.layout, self.comm, lane, self.views, self.full.dtype, suspect)

    @property
    def span(self) -> tuple[int, int]:
        """The element range that this rank updates."""
        return self.layout.span(self.comm.rank) if self.plan.states.sharded else (0, self.layout.numel)

    @cached_property
    def pieces(self) -> list[Piece]:
        """The parts of parameters in the range that this rank updates."""
        return list(self.layout.pieces(*self.span))

    @cached_property
    def spans(self) -> Tensor:
        """int64 (n, 3): start, stop and entry of the parts of parameters in this rank's shard."""
        assert self.grads is not None
        rows = [(p.offset, p.offset + p.stop - p.start, self.entries[p.slot].index) for p in self.grads.pieces]
        return torch.tensor(rows, dtype=torch.int64)

    @property
    def trained(self) -> bool:
        return self.state is not None

    # ---- parameters

    def gather(self) -> None:
        """Begins to fill `full` from all ranks' shards. Idempotent: calling it early is prefetching."""
        if self.whole:
            return
        self.whole = True
        what = f"gather {self.name}"
        if self.home is not None:
            self.comm.ledger.enter(what, 0)
            self.pending = Done(self.full)
        else:
            self.full.untyped_storage().resize_(self.full.numel() * self.full.element_size())
            self.pending = self.comm.gather(self.full, self.shard, what)
        self.comm.ledger.note("gather", self.name)

    def ready(self) -> None:
        """Waits for a gather under way and shows the parameters whole."""
        self.gather()
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
            if self.plan.params.sharded:
                self._show(self.views)

    def release(self) -> None:
        """Frees `full` if parameters rest sharded, after keeping what was written to the parameters meanwhile."""
        if not self.plan.params.sharded or not self.whole:
            return
        self.ready()
        if self.home is None:
            self.keep_writes(quiet=True)
        self._show(self.blanks)
        if self.home is None:
            self.full.untyped_storage().resize_(0)
        self.whole = False
        self.comm.ledger.note("release", self.name)

    def publish(self) -> None:
        """Begins to copy every rank's updated range into `full` on all ranks, if parameters rest whole."""
        if self.home is not None:
            self.published = self.home.publish(f"gather {self.name}")
        elif self.plan.states.sharded and not self.plan.params.sharded:
            self.pending = self.comm.gather(self.full, self.shard, f"gather {self.name}")
        else:
            return
        self.comm.ledger.note("publish", self.name)

    def finish_publish(self) -> None:
        """Waits for a publish."""
        if self.published is not None:
            self.published.wait()
            self.published = None
            if self.stale and self.home is not None:
                self.home.refresh()
                self.stale = False
        elif not self.plan.params.sharded:
            self.ready()

    def replaced(self) -> list[Entry]:
        """Parameters that no longer use the memory that this bucket gave them."""
        dtype = self.full.dtype
        if self.whole and self.pending is None:
            base, width = self.full.data_ptr(), self.full.element_size()
            places = [base + slot.offset * width if slot.numel else 0 for slot in self.layout.slots]
        else:
            places = self.blank_places
        return [
            entry
            for entry, place in zip(self.entries, places, strict=True)
            if (p := entry.param).data_ptr() != place or p.dtype is not dtype
        ]

    def written(self) -> list[int]:
        """Slots whose parameter was written in place by someone else since our last write."""
        return [slot for slot, entry in enumerate(self.entries) if entry.param._version != entry.version]

    def keep_writes(self, quiet: bool = False, everywhere: bool = False, before: Tensor | None = None) -> None:
        """Adopts values that someone else wrote to the parameters: the master becomes the new value.

        everywhere  compare all parameters, also those that autograd's version counter calls unchanged (p.data)
        before      what `mine` held, where it is a view of `full` and so cannot tell
        """
        slots = list(range(len(self.entries))) if everywhere else self.written()
        separate = self.plan.params.sharded or self.home is not None  # `mine` is not a view of `full`
        if self.home is not None:
            self.stale = self.stale or self.home.dirty()
            slots = list(range(len(self.entries))) if self.stale else []
            if slots and self.mine is self.shard:
                self.mine = self.shard.clone()  # other ranks may be reading the home
        if not slots:
            return
        start = self.span[0]
        found = not separate
        for piece in self.pieces:
            if piece.slot not in slots:
                continue
            part = slice(piece.offset, piece.offset + piece.stop - piece.start)
            at = self.layout.slots[piece.slot].offset + piece.start
            assert piece.offset == at - start
            new = self.full[at : at + piece.stop - piece.start]
            changed = torch.ones_like(new, dtype=torch.bool)
            if separate or before is not None:
                old = self.mine if before is None else before
                changed = new.view(bits_dtype(new.dtype)) != old[part].view(bits_dtype(new.dtype))
                self.mine[part] = new
                found = found or bool(changed.any())
            if self.rest.numel():
                fresh = torch.zeros_like(self.rest[part]) if self.rest.dtype == torch.int16 else new.float()
                self.rest[part] = torch.where(changed, fresh, self.rest[part])
        for slot in slots:
            self.entries[slot].version = self.entries[slot].param._version
        if found and not quiet and self.rest.numel():
            warnings.warn(
                f"parameter '{self.entries[slots[0]].name}' (and {len(slots) - 1} more) was written outside of the optimizer: "
                "its fp32 master restarts from the written value.",
                stacklevel=2,
            )

    # ---- the update

    def update(self, targets: list[Target]) -> None:
        """One fused pass over the range this rank updates: sum, average, update, new parameters."""
        assert self.state is not None and self.grads is not None
        if self.home is not None and self.mine is not self.shard:
            self.mine = self.shard.copy_(self.mine)
        sources, mean = self.grads.sources() if self.plan.states.sharded else ([self.whole_gradient()], 1.0)
        self.state.step(self.mine, self.rest, sources, mean, targets)
        self.comm.ledger.note("update", self.name)
        self.grads.clear()

    def whole_gradient(self) -> Tensor:
        """The averaged gradient of the whole bucket on every rank (a collective)."""
        assert self.grads is not None
        self.grads.finish()
        average = self.grads.sources()[0][0]
        full = torch.empty(self.layout.numel, dtype=average.dtype, device=average.device)
        return self.comm.gather(full, average, f"gather {self.name} gradients").wait()

    def wrote(self, entries: list[Entry]) -> None:
        """Marks parameters as changed, for autograd (a saved tensor of an older graph raises) and for us."""
        torch.autograd.graph.increment_version([entry.param for entry in entries])
        for entry in entries:
            entry.version = entry.param._version

    # ---- by parameter

    def master(self, part: slice) -> Tensor:
        """The fp32 master of a range of `mine`."""
        rest = self.rest[part] if self.rest.numel() else self.rest
        return join(self.mine[part], rest)

    def collect_whole(self, local: Tensor, what: str) -> Tensor:
        """One tensor of `mine`'s range, made whole over ranks."""
        if not self.plan.states.sharded:
            return local
        full = torch.empty(self.layout.numel, dtype=local.dtype, device=local.device)
        return self.comm.gather(full, local.contiguous(), f"{what} {self.name}").wait()

    @property
    def row(self) -> tuple[Layout, int, int, bool]:
        """Layout, bytes of a parameter element, bytes of remainder or master an element, and whether it is trained."""
        return self.layout, self.full.element_size(), self.rest.element_size() if self.rest.numel() else 0, self.trained

    def holdings(self) -> dict[str, list[Tensor]]:
        """Live tensors by term of memory.FINE (views of one storage count once, in the first term that has them)."""
        if self.home is None:
            params, units = ([self.shard], [self.full]) if self.plan.params.sharded else ([self.full, self.shard], [])
        else:  # `full` and `shard` are the same memory, mapped twice: a gather takes none
            params, units = [self.shard if self.plan.params.sharded else self.full], []
            params += [self.mine] if self.mine is not self.shard else []
        grads = self.grads
        return {
            "params": params,
            "units": units,
            "grads": grads.resting() if grads is not None else [],
            "flight": grads.flying() if grads is not None else [],
            "kept": grads.lane.kept() if grads is not None else [],
            "master": [self.rest],
            "moments": self.state.tensors() if self.state is not None else [],
        }


def rest_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of what completes a parameter to its fp32 master: int16 remainder of bf16, fp32 master of fp16."""
    return {torch.bfloat16: torch.int16, torch.float16: torch.float32, torch.float32: torch.float32}[dtype]


def bits_dtype(dtype: torch.dtype) -> torch.dtype:
    """The integer dtype of the same width, to compare bits (NaN included)."""
    return torch.int32 if dtype == torch.float32 else torch.int16


def dense_strides(p: Tensor) -> tuple[int, ...]:
    """The strides of p where it is dense without overlap (channels_last, transposed), else contiguous ones."""
    return torch.empty_like(p, device="meta").stride()


__all__ = ["Bucket", "Entry", "Widths", "bits_dtype", "dense_strides", "rest_dtype"]
