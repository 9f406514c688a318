"""Threads that do what was handed to them, in order, while the training loop goes on.

The kernels that they call release the interpreter's lock and use the pool of native threads.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

_LOOK = 0.5  # seconds between looks at what else went wrong


class Failure:
    """What went wrong in any of several workers: after it nothing more is done, because what follows depends on it."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def check(self) -> None:
        """Raises RuntimeError where a job failed."""
        if self.error is not None:
            kind = type(self.error) if isinstance(self.error, RuntimeError) else RuntimeError  # a lost rank stays one
            raise kind(
                f"an offloaded update failed beside the training loop ({type(self.error).__name__}: {self.error}). Parameters "
                "and states may be updated in part: restart from a checkpoint."
            ) from self.error


class Job:
    """Something handed over; `wait` returns when it is done and raises what went wrong."""

    def __init__(self, failure: Failure, process: int) -> None:
        self.failure = failure
        self.process = process
        self.done = threading.Event()

    def wait(self) -> None:
        if not self.done.is_set():
            if self.process != os.getpid():
                raise RuntimeError(
                    "this process was forked while an update was under way, which goes on in the parent alone. Read a "
                    "parameter (any of them) before the fork, or build with overlap=False."
                )
            while not self.done.wait(_LOOK):
                self.failure.check()  # it may never have been begun
        self.failure.check()

    def sync(self) -> None:
        """As a Mark."""
        self.wait()

    def meet(self, other: Any) -> None:
        """As a Mark: what a worker does, it waits for by itself."""
        other.wait()


class Worker:
    """One thread, started with the first job."""

    def __init__(self, name: str, failure: Failure) -> None:
        self.name = name
        self.failure = failure
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Job] | None] = queue.SimpleQueue()
        self._last: Job | None = None
        self._process = os.getpid()
        self._started = False
        _WORKERS.add(self)

    def submit(self, run: Callable[[], None]) -> Job:
        """Hands over a job."""
        self.failure.check()
        if not self._started:
            threading.Thread(target=_serve, args=(self._jobs,), daemon=True, name=self.name).start()
            self._started = True  # not where threads have run out: the next job tries again
            weakref.finalize(self, self._jobs.put, None)
        self._last = job = Job(self.failure, self._process)
        self._jobs.put((run, job))
        return job

    def drain(self) -> None:
        """Returns when everything handed over is done; raises what went wrong."""
        if self._last is not None:
            self._last.wait()


_WORKERS: weakref.WeakSet[Worker] = weakref.WeakSet()
_THREAD = threading.local()


def in_worker() -> bool:
    """Whether this thread is a worker's."""
    return hasattr(_THREAD, "jobs")


def _serve(jobs: queue.SimpleQueue[tuple[Callable[[], None], Job] | None]) -> None:
    _THREAD.jobs = jobs
    while (item := jobs.get()) is not None:
        run, job = item
        try:
            if job.failure.error is None:
                run()
        except BaseException as error:  # raised in the training thread at its next call
            job.failure.error = error
        del run, item  # what they hold is free when `done` is seen
        job.done.set()
        del job


@atexit.register
def _finish() -> None:
    """The interpreter does not end under a job's feet."""
    for worker in list(_WORKERS):
        last = worker._last
        if last is not None and worker._process == os.getpid():
            last.done.wait()
