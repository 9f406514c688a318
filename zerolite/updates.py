"""When updates run: inside step(), or beside the training loop.

    AtOnce    step() returns when every parameter is new
    Overlap   step() hands the updates to a worker, in forward order, and returns; each bucket's parameters wait for
              themselves when they are used (pending.py), and where they rest sharded a gather waits

What clips and what skips a step is settled before anything is handed over, so both give the same bits.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Protocol

import torch

from zerolite.bucket import Bucket, Entry
from zerolite.buffer import Link, Mark
from zerolite.comm import Comm
from zerolite.pending import mark, unmark
from zerolite.update import Target
from zerolite.worker import Job, Worker


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


class Overlap:
    """Beside the training loop.

    comm  for the worker alone: it publishes parameters while the training thread may talk to the other ranks
    """

    def __init__(self, link: Link, worker: Worker, comm: Comm) -> None:
        self.link = link
        self.worker = worker
        self.comm = comm
        self.jobs: dict[Bucket, Job] = {}
        self.marks: dict[Bucket, Mark] = {}
        self.poison = debug("poison")

    def update(self, bucket: Bucket, targets: list[Target], entries: list[Entry]) -> None:
        run = bucket.prepare(targets)
        bucket.wrote(entries)
        if self.poison:
            _poison(bucket)
        after = self.link.now()

        def job() -> None:
            with torch.no_grad(), self.link.aside():
                run()
                bucket.publish(self.comm, after)
                bucket.finish_publish()
                self.marks[bucket] = self.link.now()

        self.jobs[bucket] = self.worker.submit(job)
        bucket.settle = functools.partial(self._settle, bucket)

    def finish(self) -> None:
        for bucket in list(self.jobs):
            if not bucket.plan.params.sharded and not mark([entry.param for entry in bucket.entries], bucket.settle):
                bucket.settle()

    def _settle(self, bucket: Bucket) -> None:
        job = self.jobs.get(bucket)
        if job is None:
            return
        job.wait()
        self.marks.pop(bucket).wait()
        del self.jobs[bucket]
        unmark(entry.param for entry in bucket.entries)

    def settle(self) -> None:
        for bucket in list(self.jobs):
            self._settle(bucket)
        self.worker.drain()

    def check(self) -> None:
        self.worker.check()


def _poison(bucket: Bucket) -> None:
    """NaN where the device has old values, so that a reader who did not wait is found."""
    if bucket.own is not bucket.mine:
        (bucket.own if bucket.plan.params.sharded else bucket.full).fill_(float("nan"))


def debug(word: str) -> bool:
    """Whether ZEROLITE_DEBUG, a comma-separated list, holds `word`. Raises ValueError for unknown words."""
    words: Sequence[str] = [part for part in os.environ.get("ZEROLITE_DEBUG", "").split(",") if part]
    unknown = [part for part in words if part not in ("poison",)]
    if unknown:
        raise ValueError(f"ZEROLITE_DEBUG: expected 'poison' or nothing, got {unknown[0]!r}")
    return word in words
