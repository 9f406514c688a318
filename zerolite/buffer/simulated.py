"""A CPU that plays a device: one thread for copies each way, with delays, so that an early read finds old values.

Everything that a GPU would reorder can be reordered here, and any schedule of delays must give the same bits.
"""

from __future__ import annotations

import queue
import random
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from zerolite.buffer.link import Mark, Reached
from zerolite.buffer.room import Room


class Point:
    """A copy that a thread has been given."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: Exception | None = None

    def wait(self) -> None:
        self.sync()  # a CPU computes at once: its order is the thread's

    def sync(self) -> None:
        self.done.wait()
        if self.error is not None:
            raise self.error

    def meet(self, other: Mark) -> None:
        other.wait()


class Copies:
    """One direction's copies, in order."""

    def __init__(self, delay: Callable[[], float]) -> None:
        self.jobs: queue.SimpleQueue[tuple[Callable[[], None], Point] | None] = queue.SimpleQueue()
        thread = threading.Thread(target=_serve, args=(self.jobs, delay), daemon=True, name="zerolite copies")
        weakref.finalize(self, self.jobs.put, None)
        thread.start()

    def add(self, copy: Callable[[], None]) -> Point:
        point = Point()
        self.jobs.put((copy, point))
        return point


def _serve(jobs: queue.SimpleQueue, delay: Callable[[], float]) -> None:
    while (job := jobs.get()) is not None:
        copy, point = job
        time.sleep(delay())
        try:
            copy()
        except Exception as error:  # raised where the copy is waited for
            point.error = error
        del copy, job
        point.done.set()


class Simulated:
    """The link of a CPU that plays a device.

    seed   of the delays
    most   the longest delay of one copy, seconds; half of the copies have none
    """

    kind, separate = "simulated", True

    def __init__(self, seed: int = 0, most: float = 0.0) -> None:
        self.device = torch.device("cpu")
        self.host = Room(torch.device("cpu"), pin=lambda region: None)
        self.near = Room(self.device)
        self.copied = {"down": 0, "up": 0}  # bytes
        chance = random.Random(seed)
        lock = threading.Lock()

        def delay() -> float:
            with lock:
                return chance.random() * most if most and chance.random() < 0.5 else 0.0

        self._down, self._up = Copies(delay), Copies(delay)

    @classmethod
    def parse(cls, text: str) -> Simulated:
        """From SEED[:MILLISECONDS[:BYTES]], BYTES of device memory for plans. Raises ValueError for anything else."""
        try:
            seed, most, *size = [*text.split(":"), "0"][: max(len(text.split(":")), 2)]
            if len(size) > 1 or any(int(value) <= 0 for value in size):
                raise ValueError
            return cls(int(seed), float(most) / 1e3)
        except ValueError:
            raise ValueError(f"ZEROLITE_SIMULATE: expected SEED[:MILLISECONDS[:BYTES]], got {text!r}") from None

    def now(self) -> Mark:
        return Reached()

    def down(self, out: Tensor, source: Tensor, kept: bool = False) -> Mark:
        self.copied["down"] += source.numel() * source.element_size()
        return self._down.add(lambda: _copy(out, source, Reached()))

    def up(self, out: Tensor, source: Tensor, after: Mark, alone: bool = False, kept: bool = False) -> Mark:
        self.copied["up"] += source.numel() * source.element_size()
        return self._up.add(lambda: _copy(out, source, after))

    def register(self, memory: Tensor) -> None:
        return

    def linked(self, ranks: int) -> bool:
        return True  # ZEROLITE_CONNECT=memory for tests

    def aside(self) -> AbstractContextManager:
        return nullcontext()


def _copy(out: Tensor, source: Tensor, after: Mark) -> None:
    after.sync()
    with torch.no_grad():
        out.copy_(source)
