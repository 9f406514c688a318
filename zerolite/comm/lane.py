"""A lane carries one bucket's gradient rounds between ranks.

full = lane.take(dtype)         this rank's buffer, to be written; padding is zero
pending = lane.exchange(full)   it is complete; pending.wait() gives the N ranks' slices for this rank, in rank order
lane.done()                     the slices are not read any more
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from zerolite.comm import Comm, Pending


class Lane(Protocol):
    """How one bucket's rounds travel."""

    def take(self, dtype: torch.dtype) -> Tensor:
        """A 1D buffer for this rank's round: padding is zero, the rest is to be written."""
        ...

    def exchange(self, full: Tensor, what: str) -> Pending:
        """Sends a round; the result has shape (ranks, shard), or is a list of ranks 1D tensors."""
        ...

    def done(self) -> None:
        """The result of the last exchange is not read any more (or never will be)."""
        ...

    def rest(self) -> None:
        """The backward is over: memory that only carried rounds can go."""
        ...


class MessageLane:
    """Rounds as messages: a fresh buffer each time, and an all-to-all of slices."""

    def __init__(self, comm: Comm, numel: int, device: torch.device) -> None:
        self.comm = comm
        self.numel = numel
        self.device = device

    def take(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.numel, dtype=dtype, device=self.device)

    def exchange(self, full: Tensor, what: str) -> Pending:
        return self.comm.exchange(full, what)

    def done(self) -> None:
        """The message is its reader's own."""

    def rest(self) -> None:
        """Nothing is kept."""
