"""When and where updates run.

    AtOnce    inside step(), where the parameters are
    Apart     states are in another memory than the device's: workers update buckets in forward order on the host, on the
              device in chunks (stream.py), or both, whichever is free. step() returns at once (overlap), and each bucket's
              parameters wait for themselves when they are used (pending.py); where they rest sharded a gather waits.

What clips and what skips a step is settled before anything is handed over, so all give the same bits.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

from zerolite.average import Staging
from zerolite.bucket import Bucket
from zerolite.buffer import Link, Mark
from zerolite.comm import Comm
from zerolite.comm.group import GroupComm
from zerolite.comm.pinned import PinnedComm
from zerolite.entry import Entry
from zerolite.feed import Feed
from zerolite.options import feed_size
from zerolite.pending import mark, unmark
from zerolite.placement import Plan
from zerolite.stream import Stream
from zerolite.update import Rule, Target
from zerolite.worker import Failure, Job, Worker
from zerolite.writes import Pass

log = logging.getLogger("zerolite")


class Updates(Protocol):
    """How a step's updates are run."""

    def update(self, bucket: Bucket, targets: list[Target], entries: list[Entry]) -> None:
        """Updates one bucket (buckets in forward order)."""
        ...

    def finish(self) -> None:
        """The last bucket of the step was given."""
        ...

    def settle(self) -> None:
        """Waits until everything is updated; raises what went wrong after step() had returned."""
        ...

    def check(self) -> None:
        """Raises what has gone wrong so far, without waiting."""
        ...

    def close(self) -> None:
        """Nothing more is updated (every rank calls it)."""
        ...


class AtOnce:
    """Inside step()."""

    def __init__(self) -> None:
        self.given: list[Bucket] = []

    def update(self, bucket: Bucket, targets: list[Target], entries: list[Entry]) -> None:
        bucket.update(targets)
        bucket.wrote(entries)
        bucket.publish()
        self.given.append(bucket)

    def finish(self) -> None:
        given, self.given = self.given, []
        for bucket in given:
            bucket.finish_publish()

    def settle(self) -> None:
        return

    def check(self) -> None:
        return

    def close(self) -> None:
        return


class Task:
    """One bucket's update."""

    def __init__(self, bucket: Bucket, work: Pass, after: Mark, job: Job) -> None:
        self.bucket = bucket
        self.work = work
        self.after = after  # until then the device uses the old parameters
        self.job = job  # done when the new ones are on their way to their readers
        self.up = True  # the device's parameters are still to be written
        self.arrived: Mark | None = None

    @property
    def numel(self) -> int:
        return self.bucket.mine.numel()


class Way:
    """Where buckets are updated, and how fast it was."""

    name: str
    worker: Worker

    def __init__(self, name: str, failure: Failure) -> None:
        self.name = name
        self.worker = Worker(f"zerolite {name} update", failure)
        self.rate: float | None = None  # seconds an element
        self.end = 0.0  # when the task under way is expected to be done; 0: there is none
        self.done = 0  # elements updated so far

        self.following: Callable[[], Pass | None] = lambda: None  # what will be updated next, here or by another way

    def run(self, task: Task) -> None:
        raise NotImplementedError

    def timed(self, task: Task) -> None:
        start = time.perf_counter()
        self.run(task)
        task.work.sources = []  # on the device, room for the forward
        rate = (time.perf_counter() - start) / max(task.numel, 1)
        self.rate = rate if self.rate is None else 0.7 * self.rate + 0.3 * rate
        self.done += task.numel


class OnHost(Way):
    """The fused pass over host memory."""

    def run(self, task: Task) -> None:
        feed = task.work.feed
        if feed is None:
            task.work()
        else:
            feed.run(task.work, self.following)


class Streamed(Way):
    """Chunks through the device."""

    def __init__(self, name: str, failure: Failure, stream: Stream) -> None:
        super().__init__(name, failure)
        self.stream = stream

    def run(self, task: Task) -> None:
        bucket, work = task.bucket, task.work
        own = bucket.own if bucket.own is not bucket.mine else None
        near = work.feed is not None
        work.coming.wait() if near else work.coming.sync()
        self.stream.run(work.work, bucket.mine, bucket.rest, work.sources[0], own, task.after, near)  # type: ignore[arg-type]
        task.up = False


class Apart:
    """Beside the training loop.

    comm     for the workers alone: they publish parameters while the training thread may talk to the other ranks; None: not
             over a process group
    overlap  step() does not wait
    """

    def __init__(self, link: Link, ways: list[Way], failure: Failure, comm: Comm | None, overlap: bool) -> None:
        self.link = link
        self.ways = ways
        self.failure = failure
        self.comm = comm
        self.overlap = overlap
        self.poison = debug("poison")
        self.here = AtOnce()
        self.tasks: dict[Bucket, Task] = {}  # not settled
        self._settling = threading.RLock()  # any thread may be the first that reads a parameter
        self._lock = threading.Lock()
        self._waiting: deque[Task] = deque()
        self._order: deque[Task] = deque()  # to be published
        self._ready: set[Task] = set()
        self._publishing = False
        self._graphs = 0
        for way in ways:
            way.following = self._following

    # ---- the training thread

    def update(self, bucket: Bucket, targets: list[Target], entries: list[Entry]) -> None:
        if not bucket.apart:  # its states are on the device
            self.here.update(bucket, targets, entries)
            return
        work = bucket.prepare(targets)
        bucket.wrote(entries)
        if self.poison:
            _poison(bucket)
        task = Task(bucket, work, self.link.now(), Job(self.failure, os.getpid()))
        with self._settling:
            self.tasks[bucket] = task
            bucket.settle = functools.partial(self._settle, bucket)
        with self._lock:
            self._waiting.append(task)
            self._order.append(task)
        for way in self.ways:
            way.worker.submit(functools.partial(self._serve, way))

    def finish(self) -> None:
        self.here.finish()
        if not self.overlap or self._compiles():
            self.settle()
        for bucket in list(self.tasks):
            if bucket.plan.params.sharded:
                continue
            with self._settling:  # another thread may have waited for it by now
                pending = bucket not in self.tasks or mark([entry.param for entry in bucket.entries], bucket.wait)
            if not pending:
                bucket.wait()

    def _compiles(self) -> bool:
        """Whether torch.compile has compiled anew since the last step: its code asks for the class of parameters, so one
        that waits would be compiled for again at each step. From then on step() waits."""
        dynamo: Any = sys.modules.get("torch._dynamo.utils")
        graphs = int(dynamo.counters["stats"]["unique_graphs"]) if dynamo is not None else 0
        if self._graphs and graphs > self._graphs:
            self.overlap = False
            log.warning(
                "zerolite: the model is compiled (torch.compile), and compiled code cannot wait for single parameters: step() "
                "waits for the update from now on, with the same results."
            )
        self._graphs = graphs
        return not self.overlap

    def _settle(self, bucket: Bucket) -> None:
        task = self.tasks.get(bucket)
        if task is None:
            return
        task.job.wait()
        assert task.arrived is not None
        task.arrived.wait()  # this thread's work, and the training loop's, where that is on another stream
        task.after.meet(task.arrived)
        with self._settling:
            if self.tasks.get(bucket) is not task:
                return  # another thread was faster, and the next update may be under way
            if not bucket.plan.params.sharded:
                unmark(entry.param for entry in bucket.entries)
            del self.tasks[bucket]
            bucket.settle = None

    def settle(self) -> None:
        for bucket in list(self.tasks):
            self._settle(bucket)
        for way in self.ways:
            way.worker.drain()

    def check(self) -> None:
        self.failure.check()

    def close(self) -> None:
        self.settle()
        self.link.now().sync()  # the last gather is over
        if isinstance(self.comm, GroupComm):
            self.comm.close()
        self.comm = None

    # ---- the workers

    def _serve(self, way: Way) -> None:
        """Takes buckets while there are any that this way would finish first."""
        try:
            while (task := self._take(way)) is not None:
                with torch.no_grad(), self.link.aside():
                    way.timed(task)
                    self._publish(task)
        except BaseException as error:
            self.failure.error = error  # before anyone is woken
            with self._lock:
                left, self._order = list(self._order), deque()
                self._waiting.clear()
            for task in left:
                task.job.done.set()
            raise

    def _take(self, way: Way) -> Task | None:
        with self._lock:
            now = time.perf_counter()
            way.end = 0.0
            if not self._waiting or self.failure.error is not None:
                return None
            for other in self.ways:
                if other is not way and other.end and other.rate and way.rate:
                    rest = sum(task.numel for task in self._waiting) * other.rate
                    if way.rate * self._waiting[0].numel > max(other.end - now, 0.0) + rest:
                        return None  # the other one is at work, and has done all of it sooner
            task = self._waiting.popleft()
            way.end = now + max((way.rate or 0.0) * task.numel, 1e-9)
            return task

    def _following(self) -> Pass | None:
        with self._lock:
            return self._waiting[0].work if self._waiting else None

    def _publish(self, task: Task) -> None:
        """Publishes what is updated, in the order in which it was given, which is the same on every rank."""
        with self._lock:
            self._ready.add(task)
            if self._publishing:
                return  # whoever publishes now comes to it
            self._publishing = True
        while True:
            with self._lock:
                if not self._order or self._order[0] not in self._ready:
                    self._publishing = False
                    return
                first = self._order.popleft()
                self._ready.discard(first)
            try:
                first.bucket.publish(self.comm, first.after, first.up)
                first.bucket.finish_publish()
                first.arrived = self.link.now()
            except BaseException as error:
                self.failure.error = error
                raise
            finally:
                first.job.done.set()


def _poison(bucket: Bucket) -> None:
    """NaN where the device has old values, so that a reader who did not wait is found."""
    if bucket.own is not bucket.mine:
        (bucket.own if bucket.plan.params.sharded else bucket.full).fill_(float("nan"))


def debug(word: str) -> bool:
    """Whether ZEROLITE_DEBUG, a comma-separated list, holds `word`. Raises ValueError for unknown words."""
    words = [part for part in os.environ.get("ZEROLITE_DEBUG", "").split(",") if part]
    unknown = [part for part in words if part not in ("poison",)]
    if unknown:
        raise ValueError(f"ZEROLITE_DEBUG: expected 'poison' or nothing, got {unknown[0]!r}")
    return word in words


def make_updates(
    plan: Plan, rule: Rule, link: Link, device: torch.device, comm: Comm, update: str, overlap: bool
) -> tuple[Updates, Staging | None]:
    """Where and when states are updated, and what brings gradients to states that are apart from the device (a collective)."""
    if not (link.separate and plan.states.home == "host"):
        return AtOnce(), None
    failure = Failure()
    if isinstance(comm, PinnedComm):
        comm.check = failure.check
    staging = Staging(link, Worker("zerolite gradients", failure))
    if plan.grads.home == "device":
        staging.feed = Feed(link, feed_size(update, rule.threaded))
    if not rule.threaded:
        return AtOnce(), staging
    ways: list[Way] = []
    if update in ("auto", "host"):
        ways.append(OnHost("host", failure))
    if update in ("auto", "stream"):
        ways.append(Streamed("stream", failure, Stream(link, device)))
    side = comm.beside() if plan.publishes and not isinstance(comm, PinnedComm) else None
    if side is not None:  # a group begins with its first call: now, in this thread
        side.max_(torch.zeros(1, dtype=torch.int64, device="cpu"), "set-up updates")
    return Apart(link, ways, failure, side, overlap), staging
