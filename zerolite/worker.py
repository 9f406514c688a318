"""A thread that does what was handed to it, in order, while the training loop goes on.

The kernels that it calls release the interpreter's lock and use the pool of native threads.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import weakref
from collections.abc import Callable


class Job:
    """Something handed over; `wait` returns when it is done and raises what it raised."""

    def __init__(self, worker: Worker, run: Callable[[], None]) -> None:
        self.worker = worker
        self.run: Callable[[], None] | None = run
        self.done = threading.Event()

    def wait(self) -> None:
        if not self.done.is_set():
            self.worker.check_process()
            self.done.wait()
        self.worker.check()

    def sync(self) -> None:
        """As a Mark."""
        self.wait()


class Worker:
    """One thread, started with the first job. After a failure nothing more is done: what follows depends on it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.error: BaseException | None = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._last: Job | None = None
        self._process = os.getpid()
        self._started = False
        _WORKERS.add(self)

    def submit(self, run: Callable[[], None]) -> Job:
        """Hands over a job."""
        self.check()
        self.check_process()
        if not self._started:
            self._started = True
            threading.Thread(target=_serve, args=(weakref.ref(self), self._jobs), daemon=True, name=self.name).start()
            weakref.finalize(self, self._jobs.put, None)
        job = self._last = Job(self, run)
        self._jobs.put(job)
        return job

    @property
    def busy(self) -> bool:
        """Whether something was handed over that is not done."""
        return self._last is not None and not self._last.done.is_set()

    def drain(self) -> None:
        """Returns when everything handed over is done; raises as `check`."""
        if self._last is not None:
            self._last.wait()

    def check(self) -> None:
        """Raises RuntimeError where a job failed."""
        if self.error is not None:
            raise RuntimeError(
                f"{self.name}: an update failed after step() had returned ({type(self.error).__name__}: {self.error}). "
                "Parameters and states may be updated in part: restart from a checkpoint. With overlap=False step() raises it."
            ) from self.error

    def check_process(self) -> None:
        """Raises RuntimeError in a forked child, which has no such thread."""
        if self._process != os.getpid():
            raise RuntimeError(
                f"{self.name}: this process was forked while an update was under way, which goes on in the parent alone. "
                "Read a parameter (any of them) before the fork, or build with overlap=False."
            )


_WORKERS: weakref.WeakSet[Worker] = weakref.WeakSet()


def _serve(owner: weakref.ref[Worker], jobs: queue.SimpleQueue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        worker = owner()
        try:
            if worker is not None and worker.error is None and job.run is not None:
                job.run()
        except BaseException as error:  # raised in the training thread at its next call
            if worker is not None:
                worker.error = error
        job.run = None  # what it holds is free when `done` is seen
        job.done.set()
        del job, worker


@atexit.register
def _finish() -> None:
    """The interpreter does not end under a job's feet."""
    for worker in list(_WORKERS):
        last = worker._last
        if last is not None and worker._process == os.getpid():
            last.done.wait()
