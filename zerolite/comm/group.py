"""Communication over a torch.distributed process group.

A collective that does not finish is looked into after `PATIENCE` seconds: every late rank posts what it waits
for in the group's store. Where all have posted and they differ, each raises at once and names the difference,
instead of waiting for the group's timeout (30 minutes by default); where they agree, a rank is merely slow.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from zerolite.comm import Comm
from zerolite.comm.lane import Lane, LaneSpec, MessageLane
from zerolite.comm.ledger import WHO, Ledger, RankError
from zerolite.comm.local import LocalComm

_T = TypeVar("_T")
PATIENCE = float(os.environ.get("ZEROLITE_PATIENCE", "5"))  # seconds before ranks compare notes

_SHORT = 512  # bytes of a shared value that take one collective, where others take two

# torch 2.13 renamed the tensor collectives; both names are served here and nowhere else.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Waiting:
    """A collective under way, its result, and how to explain a failure."""

    def __init__(self, comm: GroupComm, work: Any, result: Tensor, what: str) -> None:
        self.comm = comm
        self.work = work
        self.result = result
        self.what = what
        self.order = sum(comm.ledger.calls.values())

    @property
    def under_way(self) -> bool:
        return self.work is not None

    def wait(self) -> Tensor:
        if self.work is not None:
            if self.result.is_cuda:
                self.work.wait()  # the stream waits, not the host; the group's watchdog looks after lost ranks
            else:
                self._wait()
            self.work = None  # not where a signal has interrupted it: who comes again must wait again
        return self.result

    def _wait(self) -> None:
        deadline = time.monotonic() + self.comm.timeout
        seen: list[str] = []
        late = False
        try:
            while not self._done(deadline):
                late = True
                seen = self.comm.compare(self.what, self.order, seen)
                if time.monotonic() >= deadline:
                    raise self.comm.late(self.what)
        finally:
            if late:
                self.comm.retract()

    def _done(self, deadline: float) -> bool:
        patience = min(PATIENCE, max(deadline - time.monotonic(), 0.001))
        try:
            self.work.wait(datetime.timedelta(seconds=patience))
        except RuntimeError as error:
            if not self.work.is_completed():
                if "timed out" not in str(error).lower():
                    raise self.comm.lost(self.what, error) from error
                return False
            self._end()
        return True

    def _end(self) -> None:
        """Raises what a completed collective ended with (one may complete just after a wait for it has timed out)."""
        try:
            self.work.wait()
        except RuntimeError as error:
            late = "timed out" in str(error).lower()  # by the group's own clock
            raise (self.comm.late(self.what) if late else self.comm.lost(self.what, error)) from error


class _Store:
    """The key-value store of torch.distributed, asked from a thread of its own: where its host is stopped, it never answers."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def ask(self, call: Callable[[dist.Store], _T], undo: Callable[[dist.Store], None] | None = None) -> _T | None:
        """call(store); None where the store or the group is gone, or no answer comes in PATIENCE seconds. What is done later
        all the same is undone."""
        if self._thread is not None and self._thread.is_alive():
            return None
        try:
            store = dist.distributed_c10d._get_default_store()
        except (RuntimeError, ValueError):
            return None
        answers: list[_T] = []
        late = threading.Event()

        def run() -> None:
            with contextlib.suppress(RuntimeError, ValueError):  # its host is gone: the collective itself reports that
                answers.append(call(store))
                if late.is_set() and undo is not None:
                    undo(store)

        self._thread = threading.Thread(target=run, name="zerolite-store", daemon=True)
        self._thread.start()
        self._thread.join(PATIENCE)
        late.set()
        return answers[0] if answers else None


class GroupComm:
    """The Comm of a torch.distributed process group (None: the default group)."""

    def __init__(self, group: dist.ProcessGroup | None = None, tag: str = "") -> None:
        self.tag = tag  # tells a thread's own group from the one beside it, where late ranks compare notes
        self.group = group if group is not None else dist.group.WORLD
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.ledger = Ledger()
        self.control = _control(self.group)
        self.timeout = _timeout(self.group, self.control)
        self.members = dist.get_process_group_ranks(self.group)
        self.store = _Store()

    def exchange(self, full: Tensor, what: str) -> Waiting:
        self.ledger.enter(what, _bytes(full) * (self.size - 1) // self.size)
        out = torch.empty(self.size, full.numel() // self.size, dtype=full.dtype, device=full.device)
        return self._start(what, out, lambda: dist.all_to_all_single(out.view(-1), full, group=self.group, async_op=True))

    def trade(self, send: Tensor, sent: list[int], received: list[int], what: str) -> Waiting:
        """All-to-all of uneven parts: `sent[r]` elements of `send` to rank r, `received[r]` of the result from it."""
        self.ledger.enter(what, _bytes(send))
        out = torch.empty(sum(received), dtype=send.dtype, device=send.device)
        return self._start(
            what, out, lambda: dist.all_to_all_single(out, send, received, sent, group=self.group, async_op=True)
        )

    def gather(self, full: Tensor, shard: Tensor, what: str) -> Waiting:
        self.ledger.enter(what, _bytes(shard) * (self.size - 1))
        return self._start(what, full, lambda: _all_gather(full, shard, group=self.group, async_op=True))

    def sum_(self, values: Tensor, what: str) -> None:
        self._reduce(values, dist.ReduceOp.SUM, what)

    def max_(self, values: Tensor, what: str) -> None:
        self._reduce(values, dist.ReduceOp.MAX, what)

    def _reduce(self, values: Tensor, op: Any, what: str) -> None:
        self.ledger.enter(what, _bytes(values))
        carried = self._carried(values)
        self._start(what, carried, lambda: dist.all_reduce(carried, op, group=self.group, async_op=True)).wait()
        if carried is not values:
            values.copy_(carried)

    def broadcast_(self, values: Tensor, what: str) -> None:
        self.ledger.enter(what, _bytes(values))
        source, carried = self.members[0], self._carried(values)
        self._start(what, carried, lambda: dist.broadcast(carried, source, group=self.group, async_op=True)).wait()
        if carried is not values:
            values.copy_(carried)

    def _carried(self, values: Tensor) -> Tensor:
        """The tensor itself, or where the group (NCCL) takes no host memory, a copy on the device."""
        return values if self.control.type == "cpu" or values.is_cuda else values.to(self.control)

    def share(self, value: Any, what: str) -> list[Any]:
        self.ledger.enter(what, 0)
        data, problem = _pickled(value)
        count, room = torch.tensor([len(data)], device="cpu").view(torch.uint8), _SHORT
        while True:  # once for what is short, as most is; else again, with room for the longest
            mine = torch.zeros(len(count) + room, dtype=torch.uint8, device="cpu")
            mine[: len(count)], mine[len(count) :][: len(data)] = count, data[:room]
            mine = mine.to(self.control)
            all_ = torch.empty(self.size * len(mine), dtype=torch.uint8, device=self.control)
            gather = functools.partial(_all_gather, all_, mine, group=self.group, async_op=True)
            rows = self._start(what, all_, gather).wait().cpu().view(self.size, -1)
            counts = rows[:, : len(count)].reshape(-1).view(torch.int64).tolist()
            if max(counts) <= room:
                break
            room = max(counts)
        values = [pickle.loads(bytes(row[len(count) :][:n].numpy())) for row, n in zip(rows, counts, strict=True)]
        if problem is not None:
            raise problem
        for rank, found in enumerate(values):
            if isinstance(found, _Unsent):
                raise RankError(f"rank {rank} in '{what}': what it tells the others has to be picklable, and is not ({found}).")
        return values

    def lanes(self, specs: Sequence[LaneSpec], device: torch.device) -> list[Lane]:
        kinds = {False: MessageLane, True: ScatterLane}
        return [kinds[spec.scatter](self, spec, device) for spec in specs]

    def scatter(self, full: Tensor, what: str) -> Waiting:
        """Reduce-scatter of an fp32 tensor, in the group's own order: the sum of this rank's slice."""
        self.ledger.enter(what, _bytes(full) * (self.size - 1) // self.size)
        out = torch.empty(full.numel() // self.size, dtype=full.dtype, device=full.device)
        return self._start(what, out, lambda: _reduce_scatter(out, full, group=self.group, async_op=True))

    def beside(self) -> GroupComm:
        some = self.size < dist.get_world_size()
        if some:  # torch names a group that the others do not hear of by how many there are on a rank
            counts = self.share(len(dist.distributed_c10d._world.pg_names), "set-up updates")
            if len(set(counts)) > 1:
                raise ValueError(
                    f"process_group: expected ranks that are in equally many process groups, got {counts} groups: offload adds "
                    "one, which its ranks would not find. Build ZeroOptimizer before groups of only some of its ranks."
                )
        timeout = datetime.timedelta(seconds=self.timeout)
        backend = dist.get_backend_config(self.group)
        group = dist.new_group(self.members, timeout=timeout, backend=backend, use_local_synchronization=some)
        return GroupComm(group, f"{self.tag}+{group.group_name}")

    def close(self) -> None:
        """Gives back what `beside` made (every rank calls it). A group of some ranks stays: torch would give the next one its
        name, under which the store holds the addresses of this one."""
        with contextlib.suppress(ValueError):  # it went with the default group
            if self.size == dist.get_world_size():
                dist.destroy_process_group(self.group)

    def home(self, numel: int, dtype: torch.dtype, sharded: bool) -> None:
        return None

    def _start(self, what: str, result: Tensor, call: Any) -> Waiting:
        self.check(what)
        try:
            return Waiting(self, call(), result, what)
        except (RuntimeError, ValueError) as error:
            raise self.lost(what, error) from error

    def check(self, what: str) -> None:
        """Raises RankError where the group is gone."""
        if not dist.is_initialized():
            raise RankError(
                f"'{what}': the process group was destroyed. Call destroy_process_group() after the last step, and with "
                "offload after something has waited for its update (optimizer.state_dict())."
            )

    def lost(self, what: str, error: Exception) -> RankError:
        """The error of a collective that failed, with its phase and the likely cause."""
        return RankError(
            f"rank {self.rank} of {self.size} in '{what}': the process group failed, most likely because another rank "
            f"died or raised; look at the first error among the ranks' outputs. ({str(error).splitlines()[0][:200]})"
        )

    def late(self, what: str) -> RankError:
        """The error of a wait that took the group's timeout."""
        return RankError(
            f"rank {self.rank} waited {self.timeout:.0f} s in '{what}': another rank is stopped, stuck or left the training "
            "loop. The timeout is init_process_group(timeout=...)."
        )

    def compare(self, what: str, order: int, before: list[str]) -> list[str]:
        """Posts what this rank waits for. Raises where every rank waits, one for something else, and nothing has
        changed since the look that returned `before`; else returns what was seen."""

        def look(store: dist.Store) -> list[str]:
            keys = [self._post(rank) for rank in range(self.size)]
            store.set(keys[self.rank], f"{order}|{what}")
            return [store.get(key).decode() for key in keys] if store.check(keys) else []

        posted = self.store.ask(look, undo=self._take_back) or []
        if "" in posted:  # of a rank that waits no longer
            return []
        if posted == before and len(set(posted)) > 1:
            raise self.disagreement([entry.split("|", 1)[1] for entry in posted])
        return posted

    def disagreement(self, whats: list[str]) -> RankError:
        """The error of ranks that wait for different things."""
        table = "; ".join(f"rank {rank}: '{what}'" for rank, what in enumerate(whats))
        return RankError(
            f"ranks wait for different things: {table}. They took different paths through the model or the loop. {WHO}"
        )

    def retract(self) -> None:
        """Takes this rank's post back: it no longer waits. (A key that is gone would make others wait for it.)"""
        self.store.ask(self._take_back)

    def _take_back(self, store: dist.Store) -> None:
        store.set(self._post(self.rank), "")

    def _post(self, rank: int) -> str:
        return f"zerolite/{'-'.join(map(str, self.members))}{self.tag}/{rank}"


class ScatterLane(MessageLane):
    """Rounds that the group reduces: summed in fp32, averaged and rounded once to the round's dtype."""

    comm: GroupComm

    def __init__(self, comm: GroupComm, spec: LaneSpec, device: torch.device) -> None:
        super().__init__(comm, spec, device)
        self.mean = 1.0

    def exchange(self, full: Tensor, what: str) -> Averaging:
        pending = Averaging(self.comm.scatter(full.float(), what), full.dtype)
        self.sent = weakref.ref(full), weakref.ref(pending)
        return pending


class Averaging:
    """The average of a reduce-scatter under way; shape (1, numel / size)."""

    def __init__(self, sum_: Waiting, dtype: torch.dtype) -> None:
        self.sum = sum_
        self.dtype = dtype

    @property
    def result(self) -> Tensor:
        return self.sum.result.view(1, -1)

    @property
    def under_way(self) -> bool:
        return self.sum.under_way

    def wait(self) -> Tensor:
        return (self.sum.wait() / self.sum.comm.size).to(self.dtype).view(1, -1)


def _control(group: Any) -> torch.device:
    """Where small tensors of control data travel: the host where the group has a backend for it (gloo), else the GPU."""
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _timeout(group: Any, device: torch.device) -> float:
    """The group's own timeout in seconds."""
    try:
        return group._get_backend(device).options._timeout.total_seconds()
    except (RuntimeError, AttributeError):
        return dist.constants.default_pg_timeout.total_seconds()


class _Unsent(str):
    """Why a value cannot be pickled, in its place."""


def _pickled(value: Any) -> tuple[Tensor, Exception | None]:
    """The bytes of a value; else what tells the other ranks, who wait for them, and the error."""
    problem = None
    try:
        data = pickle.dumps(value)
    except Exception as error:  # whatever a class of the user's raises
        problem, data = error, pickle.dumps(_Unsent(f"{type(error).__name__}: {error}"))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8), problem


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def make_comm(process_group: Any) -> Comm:
    """The communication of a group: the given one, the default one, or a world of one."""
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        if hasattr(process_group, "exchange"):
            return process_group  # a Comm of its own (tests)
        if process_group != dist.GroupMember.NON_GROUP_MEMBER:
            raise TypeError(
                "process_group: expected a torch.distributed process group, as new_group() returns it, or None, got "
                f"{process_group!r:.80}"
            )
    if dist.is_available() and dist.is_initialized():
        size = dist.get_world_size(process_group)
        if size < 0:
            raise ValueError(
                f"process_group: expected a group with this rank in it, got one that rank {dist.get_rank()} is not part of. "
                "Each rank passes its own group, such as groups[rank // 2] of [new_group([0, 1]), new_group([2, 3])]."
            )
        if size < 2:
            return LocalComm()  # nothing moves, and nothing is copied as if it did
        return GroupComm(process_group)
    ranks = os.environ.get("WORLD_SIZE", "1")
    if process_group is not None or ranks != "1":
        raise RuntimeError(
            f"expected an initialised process group, got none (WORLD_SIZE={ranks}). Call "
            'torch.distributed.init_process_group("gloo") before ZeroOptimizer is built.'
        )
    return LocalComm()
