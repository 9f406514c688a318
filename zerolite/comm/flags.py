"""Counters in memory that the ranks of one host share: one writer each, any number of waiting processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from zerolite.kernels import flag_store_, flag_wait

_STRIDE = 8  # int64 words between counters: one cache line each


class Watch(Protocol):
    """Where this rank stands among the ranks of its host, and how it waits for them."""

    place: int  # of this rank on its host
    places: int  # ranks of this host

    def wait_for(self, ready: Callable[[float], bool], what: str) -> None:
        """Calls ready(seconds) until it is true; raises RankError where a rank died, disagrees or is late."""
        ...


class Flags:
    """One counter for each rank of a host."""

    def __init__(self, watch: Watch, memory: Tensor) -> None:
        self.watch = watch
        self.words = memory.view(torch.int64)  # [ranks * _STRIDE]
        self.places = [place * _STRIDE for place in range(watch.places)]

    @staticmethod
    def nbytes(ranks: int) -> int:
        return ranks * _STRIDE * 8

    def raise_to(self, value: int) -> None:
        """Sets this rank's counter; everything written before is visible to who sees it."""
        flag_store_(self.words, self.places[self.watch.place], value)

    def values(self) -> list[int]:
        """Every rank's counter."""
        return [int(self.words[place]) for place in self.places]

    def wait(self, value: int, what: str) -> None:
        """Waits until every rank's counter is at least `value`."""
        if not flag_wait(self.words, self.places, value, 0.0):
            self.watch.wait_for(lambda seconds: flag_wait(self.words, self.places, value, seconds), what)


class Arriving:
    """A result that is there once `wait` returns."""

    def __init__(self, wait: Callable[[], None], result: Any) -> None:
        self._wait = wait
        self.result = result
        self.under_way = True

    def wait(self) -> Any:
        self._wait()
        self.under_way = False
        return self.result
