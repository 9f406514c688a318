"""What connects the memory in which a model computes with the memory in which offloaded tensors rest.

    Same      a CPU: both are the same memory, and nothing is copied
    cuda      a GPU and its host: copies on streams of their own (cuda.py)
    simulated a CPU that plays a GPU: copies by threads, with delays (simulated.py), for tests

A `Mark` is a point in what a device was asked to do. Copies run beside the computation and are ordered by marks alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from zerolite.buffer.room import Room


class Mark(Protocol):
    """A point in what was asked of a device."""

    def wait(self) -> None:
        """What this thread asks of the device from now on comes after it."""
        ...

    def sync(self) -> None:
        """Returns when it is reached."""
        ...

    def meet(self, other: Mark) -> None:
        """What is asked of the device where this mark was made comes after `other`."""
        ...


class Reached:
    """A mark that is reached already."""

    def wait(self) -> None:
        return

    def sync(self) -> None:
        return

    def meet(self, other: Mark) -> None:
        other.wait()


class Link(Protocol):
    """Copies between a device and host memory. Calls return at once; every tensor is kept until its copy is done (kept: by
    the caller, until the device waits for the mark)."""

    kind: str  # "cpu", "cuda" or "simulated"
    device: torch.device  # what the model computes on
    separate: bool  # the host's memory is another memory than the device's
    host: Room  # host memory that copies cross
    near: Room  # the device's memory

    def now(self) -> Mark:
        """Everything that this thread has asked of the device so far."""
        ...

    def down(self, out: Tensor, source: Tensor, kept: bool = False) -> Mark:
        """Copies a device tensor to the host, after all that this thread has asked of the device."""
        ...

    def up(self, out: Tensor, source: Tensor, after: Mark, alone: bool = False, kept: bool = False) -> Mark:
        """Copies a host tensor to the device, after `after` and all that this thread has asked of the device (alone: after
        `after` alone). kept: nobody frees `out` before something has waited for the mark."""
        ...

    def register(self, memory: Tensor) -> None:
        """Pins memory that is mapped already, for as long as a tensor views it."""
        ...

    def linked(self, ranks: int) -> bool:
        """Whether every two of `ranks` devices of this host reach each other without the host."""
        ...

    def aside(self) -> AbstractContextManager:
        """Inside, what this thread asks of the device runs beside the computation."""
        ...


class Same:
    """A CPU."""

    kind, separate = "cpu", False

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.host = self.near = Room(self.device)

    def now(self) -> Mark:
        return Reached()

    def down(self, out: Tensor, source: Tensor, kept: bool = False) -> Mark:
        out.copy_(source)
        return Reached()

    def up(self, out: Tensor, source: Tensor, after: Mark, alone: bool = False, kept: bool = False) -> Mark:
        out.copy_(source)
        return Reached()

    def register(self, memory: Tensor) -> None:
        return

    def linked(self, ranks: int) -> bool:
        return True

    def aside(self) -> AbstractContextManager:
        return nullcontext()
