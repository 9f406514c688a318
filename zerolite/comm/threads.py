"""Ranks as threads of one process: the same verbs over shared lists and a barrier. Used by the tests."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zerolite.comm.lane import Lane, LaneSpec, message_lanes
from zerolite.comm.ledger import Ledger, RankError
from zerolite.comm.local import Done


class Meeting:
    """Where `size` threads exchange what they deposit."""

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        self.size = size
        self.barrier_timeout = timeout
        self.barrier = threading.Barrier(size, timeout=timeout)
        self.slots: list[Any] = [None] * size
        self._lock = threading.Lock()
        self._others: list[Meeting] = []
        self._asked = 0

    def beside(self) -> Meeting:
        """One more meeting for each round of calls by all ranks."""
        with self._lock:
            if self._asked % self.size == 0:
                self._others.append(Meeting(self.size, self.barrier_timeout))
            self._asked += 1
            return self._others[-1]

    def comms(self) -> list[ThreadComm]:
        """One Comm for each rank."""
        return [ThreadComm(self, rank) for rank in range(self.size)]

    def abort(self) -> None:
        """Wakes every waiting rank with an error (a rank failed)."""
        self.barrier.abort()
        for other in self._others:
            other.abort()


class ThreadComm:
    """The Comm of one thread."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting = meeting
        self.rank = rank
        self.size = meeting.size
        self.ledger = Ledger()

    def _meet(self, what: str, value: Any, read: Callable[[list[Any]], Any], sent: int) -> Any:
        self.ledger.enter(what, sent)
        meeting = self.meeting
        try:
            meeting.slots[self.rank] = (what, value)
            meeting.barrier.wait()
            asked = [slot[0] for slot in meeting.slots]
            if len(set(asked)) > 1:
                raise RankError(f"ranks disagree in '{what}': rank 0 to {self.size - 1} are at {asked}")
            result = read([slot[1] for slot in meeting.slots])
            meeting.barrier.wait()
        except threading.BrokenBarrierError:
            raise RankError(f"rank {self.rank} in '{what}': another rank failed or did not come in time") from None
        return result

    def exchange(self, full: Tensor, what: str) -> Done:
        def read(values: list[Tensor]) -> Tensor:
            return torch.stack([value.view(self.size, -1)[self.rank] for value in values])

        return Done(self._meet(what, full, read, _bytes(full) * (self.size - 1) // self.size))

    def gather(self, full: Tensor, shard: Tensor, what: str) -> Done:
        parts = self._meet(what, shard, lambda values: [value.clone() for value in values], _bytes(shard) * (self.size - 1))
        torch.cat(parts, out=full)
        return Done(full)

    def sum_(self, values: Tensor, what: str) -> None:
        values.copy_(self._meet(what, values, lambda all_: torch.stack(all_).sum(0), _bytes(values)))

    def max_(self, values: Tensor, what: str) -> None:
        values.copy_(self._meet(what, values, lambda all_: torch.stack(all_).amax(0), _bytes(values)))

    def broadcast_(self, values: Tensor, what: str) -> None:
        values.copy_(self._meet(what, values, lambda all_: all_[0].clone(), _bytes(values)))

    def share(self, value: Any, what: str) -> list[Any]:
        return self._meet(what, value, copy.deepcopy, 0)

    def lanes(self, specs: Sequence[LaneSpec], device: torch.device) -> list[Lane]:
        return message_lanes(self, specs, device)

    def beside(self) -> ThreadComm:
        return ThreadComm(self.meeting.beside(), self.rank)

    def home(self, numel: int, dtype: torch.dtype, sharded: bool) -> None:
        return None


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()
