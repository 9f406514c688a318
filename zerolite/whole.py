"""Whole parameters where they rest sharded, and writes to them: full_params(), model.state_dict() and model.load_state_dict().

Each is a collective: every rank calls it. A state dict holds copies, unit by unit, so that no more than one
unit is whole beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from zerolite.bucket import Bucket, Entry
from zerolite.hooks import Hooks
from zerolite.unit import Schedule, Unit
from zerolite.writes import take_replaced


@contextmanager
def full_params(schedule: Schedule) -> Iterator[None]:
    """All parameters whole inside; what every rank writes to them is kept."""
    schedule.hold()
    try:
        yield
    finally:
        schedule.let_go()


@contextmanager
def kept_writes(buckets: list[Bucket]) -> Iterator[None]:
    """The same where parameters rest whole: this rank's range is copied, to find what autograd's version counter does not tell.

    A home needs no copy (its pages tell), and an fp32 parameter is its own master where it is not offloaded.
    """
    watched = [b for b in buckets if b.home is None and (b.rest.numel() or b.mine is not b.own)]
    for bucket in watched:
        bucket.keep_writes()
    before = [bucket.mine.clone() for bucket in watched]
    try:
        yield
    finally:
        for bucket in buckets:
            take_replaced(bucket)
        for bucket, old in zip(watched, before, strict=True):
            bucket.keep_writes(quiet=True, everywhere=True, before=old)


class WholeStateDict:
    """Makes a model's state dict whole, and loads whole ones."""

    def __init__(self, schedule: Schedule, entries: list[Entry], owner: dict[int, Unit]) -> None:
        self.schedule = schedule
        self.entries = {entry.param: entry for entry in entries}
        self.owner = owner  # id(bucket) -> unit

    def register(self, hooks: Hooks, model: nn.Module) -> None:
        """Registers on every module that has parameters of its own, so that parts of the model work too."""
        for module in model.modules():
            if any(p in self.entries for p in module._parameters.values() if p is not None):
                hooks.on_state_dict(module, self.fill)
                hooks.on_load(module, self.borrow)
        hooks.on_loaded(model, self.schedule.give_back)

    def _mine(self, module: nn.Module) -> Iterator[tuple[str, Entry]]:
        for name, p in module._parameters.items():
            if p is not None and p in self.entries:
                yield name, self.entries[p]

    def fill(self, module: nn.Module, state: dict[str, Any], prefix: str) -> None:
        """Replaces a module's own entries by copies of the whole parameters."""
        for name, entry in self._mine(module):
            if prefix + name in state:
                self.schedule.borrow([self.owner[id(entry.bucket)]])
                state[prefix + name] = entry.param.detach().clone()

    def borrow(self, module: nn.Module) -> None:
        """Makes a module's own parameters whole, so that values can be copied into them."""
        self.schedule.borrow([self.owner[id(entry.bucket)] for _, entry in self._mine(module)])
