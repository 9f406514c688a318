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
and writing one raises, at once or when it is needed next, instead of a stale value.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from operator import attrgetter

import torch
from torch import Tensor, nn

from zerolite.average import Average, Far, Joint, Near, Staging
from zerolite.buffer import Link, Mark, Reached, Room
from zerolite.comm import Comm, Pending
from zerolite.comm.flags import Arriving
from zerolite.comm.lane import Lane
from zerolite.comm.local import Done
from zerolite.comm.pinned import PinnedComm, PinnedLane, Pool
from zerolite.comm.shared import Home
from zerolite.dtypes import dense_strides, own_storage, rest_dtype
from zerolite.entry import Entry
from zerolite.feed import Feed
from zerolite.gradient import Gradients
from zerolite.kernels import join, split_
from zerolite.layout import Layout, Piece
from zerolite.meta import make_real
from zerolite.placement import Plan
from zerolite.update import Rule, State, Target
from zerolite.writes import Pass, adopt, check_blanks, check_storage

_version = attrgetter("_version")


class Bucket:
    """Parameters of one dtype that are gathered, exchanged and updated together."""

    name: str
    layout: Layout
    plan: Plan
    comm: Comm
    entries: list[Entry]
    params: list[nn.Parameter]  # of `entries`
    rows: list[int]  # their positions among all entries
    versions: list[int]  # their `_version` after our own last write
    full: Tensor  # 1D, layout.numel, compute dtype; without a home its storage is empty while released
    whole: bool  # `full` holds the parameters, or a gather into it is under way
    home: Home | None  # the parameters once for all ranks of a host; None: every rank has its own
    pool: Pool | None  # `mine` of all ranks of the host in one tensor, from which each device copies
    shard: Tensor  # 1D, layout.shard, compute dtype: this rank's range
    mine: Tensor  # 1D: the range this rank updates, `shard` or (states whole) `full`; a copy after outside writes to a home;
    # where states are offloaded, the host's half, which is copied up to `own` after an update
    own: Tensor  # 1D: the same range on the device
    kept: bool  # states stay on the device, though others are offloaded
    apart: bool  # states are in another memory than the device's
    room: Room  # where `mine`, `rest` and the states rest
    rest: Tensor  # 1D, like `mine`: int16 remainder (bf16), fp32 master (fp16), empty (fp32 or not trained)
    state: State | None  # None: not trained
    grads: Gradients | None
    feed: Feed | None  # brings averages that rest on the device to states on the host; None: they rest together
    views: list[Tensor]  # parameter-shaped views of `full`
    nothing: Tensor  # 1D: a NaN for each parameter
    blanks: list[Tensor]  # parameter-shaped views of `nothing`, shown while released
    blank_places: list[int]  # their addresses
    places: tuple[int, list[int]]  # where `full` began when it was last asked for, and the addresses of `views` then
    pending: Pending | None  # a gather or publish into `full` under way
    published: Pending | None  # a publish into the shared home under way
    stale: bool  # this process has private pages over the shared home
    settle: Callable[[], None] | None  # waits for an update that goes on beside the training loop; None: there is none

    def __init__(
        self,
        name: str,
        layout: Layout,
        entries: list[Entry],
        plan: Plan,
        comm: Comm,
        dtype: torch.dtype,
        trained: bool,
        link: Link,
        kept: bool = False,
    ) -> None:
        self.name = name
        self.layout = layout
        self.plan = plan
        self.comm = comm
        self.entries = entries
        self.params = [entry.param for entry in entries]
        self.rows = [entry.index for entry in entries]
        self.pending = self.published = None
        self.places, self.views = (-1, []), []
        self.stale = False
        self.pool = self.state = None
        self.grads = self.feed = None
        self.settle = None
        self.link = link
        self.kept = kept
        self.apart = link.separate and plan.states.home == "host" and not kept
        device = link.device
        self.room = link.host if self.apart else Room(device)
        self.rest = torch.empty(0, device=self.room.device)
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
        if isinstance(self.comm, PinnedComm) and self.apart and self.plan.publishes:
            self.pool = self.comm.pool(self.layout.numel, dtype)
        if self.plan.states.sharded and not self.apart:  # else every rank writes all of it
            self.home = self.comm.home(self.layout.numel, dtype, self.plan.params.sharded)
        if self.home is not None:
            self.home.shared[start:stop] = self.shard
            self.shard, self.full = self.home.shared[start:stop], self.home.private
            self.home.publish(f"set-up {self.name}").wait()
        elif self.plan.params.sharded:
            self.shard = self.shard.clone()
        self.mine = self.own = self.shard if self.plan.states.sharded else self.full
        if self.pool is not None:
            self.mine = self.pool.shared[start:stop].copy_(self.own)
            self.pool.publish(f"set-up {self.name}")
        elif self.apart and (trained or self.plan.params.home == "host"):
            self.mine = self.room.zeros(self.own.numel(), dtype).copy_(self.own)
        if self.plan.params.home == "host":
            self.shard = self.own = self.mine
        if low is not None and trained:
            part = low[start:stop] if self.plan.states.sharded else low
            self.rest = self.room.zeros(part.numel(), part.dtype).copy_(part)
        elif source != dtype and trained:
            self.rest = self.room.zeros(self.mine.numel(), rest_dtype(dtype))
        views = [self._view(self.full, slot) for slot in range(len(self.entries))]
        self.views = views if self.plan.params.sharded else list(map(own_storage, views))  # sharded ones release that of `full`
        self.nothing = torch.full((len(self.views),), float("nan"), dtype=dtype, device=device)
        self.blanks = [nan.expand(view.shape) for nan, view in zip(self.nothing.unbind(), self.views, strict=True)]
        self.blank_places = [blank.data_ptr() for blank in self.blanks]
        for entry, view in zip(self.entries, self.views, strict=True):
            if entry.param.is_meta:
                make_real(entry.param, view)
        self._show(self.views)

    def _view(self, flat: Tensor, slot: int) -> Tensor:
        """The view of `slot` with its parameter's shape and (dense) strides (a released one shows blanks of other strides)."""
        p, offset = self.entries[slot].param, self.layout.slots[slot].offset
        strides = self.views[slot].stride() if self.views else dense_strides(p)
        return flat.as_strided(p.shape, strides, flat.storage_offset() + offset)

    def _show(self, tensors: list[Tensor]) -> None:
        for param, tensor in zip(self.params, tensors, strict=True):
            param.data = tensor
        self.note_versions()

    def note_versions(self) -> None:
        """What was written to the parameters so far is known."""
        self.versions = list(map(_version, self.params))

    def train(self, rule: Rule, lane: Lane, suspect: Tensor, staging: Staging | None) -> None:
        """Allocates states and gradient buffers; the remainder or master starts as the parameter is."""
        if self.apart and self.mine is self.own and self.plan.params.home != "host":  # frozen until now
            self.mine = self.room.zeros(self.own.numel(), self.full.dtype).copy_(self.own)
        if self.rest.numel() == 0 and self.full.dtype != torch.float32:
            self.rest = self.room.zeros(self.mine.numel(), rest_dtype(self.full.dtype))
            if self.full.dtype == torch.float16:
                self.rest.copy_(self.mine)
        self.state = rule.allocate(self.pieces, self.mine.numel(), self.room)
        device, dtype = self.full.device, self.full.dtype
        average: Average = Near(self.layout.shard, device, self.spans)
        if staging is not None and self.apart:
            self.feed = staging.feed
            if self.feed is None:
                kind = Joint if isinstance(lane, PinnedLane) else Far
                average = kind(self.layout.shard, dtype, self.spans, staging)
        self.grads = Gradients(self.name, self.layout, self.comm, lane, self.views, dtype, suspect, average)

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
        parts = self.layout.pieces(*self.layout.span(self.comm.rank))
        rows = [(p.offset, p.offset + p.stop - p.start, self.entries[p.slot].index) for p in parts]
        return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 3)  # whatever the default device is

    @property
    def trained(self) -> bool:
        return self.state is not None

    # ---- parameters

    def wait(self) -> None:
        """Waits for an update that goes on beside the training loop."""
        settle = self.settle
        if settle is not None:
            settle()

    def gather(self) -> None:
        """Begins to fill `full` from all ranks' shards. Idempotent: calling it early is prefetching."""
        if self.whole:
            return
        self.whole = True
        what = f"gather {self.name}"
        self.wait()
        if self.home is not None:
            self.comm.ledger.enter(what, 0)
            self.pending = Done(self.full)
        else:
            self.full.untyped_storage().resize_(self.full.numel() * self.full.element_size())
            up = self.apart and self.plan.params.home == "host"
            self.pending = self._bring(what) if up else self.comm.gather(self.full, self.shard, what)
        self.comm.ledger.note("gather", self.name)

    def _bring(self, what: str) -> Pending:
        """Gathers where parameters rest on the host: this rank's shard goes up to its range, and the ranges to all ranks."""
        start, stop = self.layout.span(self.comm.rank)
        came = self.link.up(self.full[start:stop], self.shard, Reached(), kept=True)  # release() waits for it
        if self.plan.alone:
            self.comm.ledger.enter(what, 0)
            return Arriving(came.wait, self.full)
        with self.link.aside():
            came.wait()
            return self.comm.gather(self.full, self.full[start:stop], what)

    def ready(self) -> None:
        """Waits for a gather under way and shows the parameters whole."""
        self.gather()
        if self.pending is not None:
            if self.plan.params.sharded:
                check_blanks(self)
            self.pending.wait()
            self.pending = None
            if self.plan.params.sharded:
                self._show(self.views)

    def release(self) -> None:
        """Frees `full` if parameters rest sharded, after keeping what was written to the parameters meanwhile."""
        if not self.plan.params.sharded or not self.whole:
            return
        self.ready()
        check_storage(self)
        if self.home is None:
            self.keep_writes(quiet=True)
        self._show(self.blanks)
        if self.home is None:
            self.full.untyped_storage().resize_(0)
        self.whole = False
        self.comm.ledger.note("release", self.name)

    def publish(self, comm: Comm | None = None, after: Mark | None = None, up: bool = True) -> None:
        """Begins to copy every rank's updated range into `full` on all ranks, if parameters rest whole.

        comm   what carries it, where this is done beside the training loop
        after  until then the device uses the old values
        up     the host's half is to be copied to the device first, where that is another memory
        """
        comm = comm or self.comm
        if self.pool is not None:
            self.pool.publish(f"gather {self.name}")
            self.link.up(self.full, self.pool.shared, after or self.link.now()).wait()
        elif up and self.mine is not self.own and self.home is None:
            self.link.up(self.own, self.mine, after or self.link.now()).wait()
        if self.home is not None:
            self.published = self.home.publish(f"gather {self.name}")
        elif self.plan.publishes and self.pool is None:
            self.pending = comm.gather(self.full, self.shard, f"gather {self.name}")
        else:
            return
        comm.ledger.note("publish", self.name)

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

    def written(self) -> list[int]:
        """Slots whose parameter was written in place by someone else since our last write."""
        now = list(map(_version, self.params))
        if now == self.versions:
            return []
        return [slot for slot, (new, old) in enumerate(zip(now, self.versions, strict=True)) if new != old]

    def keep_writes(self, quiet: bool = False, everywhere: bool = False, before: Tensor | None = None) -> None:
        """Adopts values that someone else wrote to the parameters: the master becomes the new value.

        everywhere  compare all parameters, also those that autograd's version counter calls unchanged (p.data)
        before      what `mine` held, where it is a view of `full` and so cannot tell
        """
        if self.plan.params.sharded and not self.whole:
            check_blanks(self)
        slots = list(range(len(self.entries))) if everywhere else [] if self.home is not None else self.written()
        if self.home is not None:
            self.stale = self.stale or self.home.dirty()
            slots = list(range(len(self.entries))) if self.stale else []
            if slots and self.mine is self.shard:
                self.mine = self.room.zeros(self.shard.numel(), self.full.dtype).copy_(self.shard)  # others may read the home
        if slots:
            adopt(self, slots, before, quiet)
            self.note_versions()

    # ---- the update

    def prepare(self, targets: list[Target]) -> Pass:
        """One fused pass over the range this rank updates: sum, average, update, new parameters. What it reads of the
        training loop (learning rates) is read now; it runs once, here or in a thread."""
        assert self.state is not None and self.grads is not None
        if self.home is not None and self.mine is not self.shard:
            self.mine = self.shard.copy_(self.mine)
        if self.feed is not None:
            self.grads.finish()  # N sources become one, on the device
        sources, mean = self.grads.sources() if self.plan.states.sharded else ([self.whole_gradient()], 1.0)
        coming = self.grads.average.coming if self.feed is None else self.link.now()
        return Pass(self, self.state.prepare(targets), sources, mean, coming, self.feed)

    def update(self, targets: list[Target]) -> None:
        """`prepare`, done at once."""
        self.prepare(targets)()
        assert self.grads is not None
        self.comm.ledger.note("update", self.name)
        self.grads.clear()

    def whole_gradient(self) -> Tensor:
        """The averaged gradient of the whole bucket on every rank (a collective)."""
        assert self.grads is not None
        self.grads.finish()
        average = self.grads.sources()[0][0]
        what = f"gather {self.name} gradients"
        if self.plan.alone:
            self.comm.ledger.enter(what, 0)
            return average
        self.grads.average.coming.sync()
        full = torch.empty(self.layout.numel, dtype=average.dtype, device=self.full.device)
        return self.comm.gather(full, average.to(full.device), what).wait().to(average.device)

    def wrote(self, entries: list[Entry]) -> None:
        """Marks parameters as changed, for autograd (a saved tensor of an older graph raises) and for us."""
        everything = len(entries) == len(self.entries)
        torch.autograd.graph.increment_version(self.params if everything else [entry.param for entry in entries])
        self.note_versions()

    # ---- by parameter

    def master(self, part: slice) -> Tensor:
        """The fp32 master of a range of `mine`."""
        rest = self.rest[part] if self.rest.numel() else self.rest
        return join(self.mine[part], rest)

    def collect_whole(self, local: Tensor, what: str) -> Tensor:
        """One tensor of `mine`'s range, made whole over ranks."""
        if not self.plan.states.sharded:
            return local
        full = torch.empty(self.layout.numel, dtype=local.dtype, device=self.full.device)
        return self.comm.gather(full, local.contiguous().to(full.device), f"{what} {self.name}").wait().to(local.device)

    @property
    def row(self) -> tuple[Layout, int, int, bool]:
        """Layout, bytes of a parameter element, bytes of remainder or master an element, and whether it is trained."""
        return self.layout, self.full.element_size(), self.rest.element_size() if self.rest.numel() else 0, self.trained
