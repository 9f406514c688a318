"""Memory that is lent in turns to what is on its way."""

from __future__ import annotations

import torch
from torch import Tensor

from zerolite.buffer.link import Mark, Reached
from zerolite.buffer.room import Room
from zerolite.placement import TURNS


class Ring:
    """Memory that is lent in turns, as large as was needed so far."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.slots: list[Tensor | None] = [None] * TURNS
        self.used: list[Mark] = [Reached()] * TURNS  # when what a slot was lent for is over
        self.turn = 0

    def reserve(self, size: int) -> None:
        """Takes memory for slots of `size` bytes, before the first is lent."""
        for turn in range(TURNS if size else 0):
            self._slot(turn, size)

    def _slot(self, turn: int, size: int) -> Tensor:
        slot = self.slots[turn]
        if slot is None or slot.numel() < size:
            self.used[turn].sync()
            slot = self.slots[turn] = self.room.zeros(size, torch.uint8)
        return slot

    def lend(self, numel: int, dtype: torch.dtype) -> tuple[int, Tensor]:
        """The next slot and its number; `used` of it is for the caller to wait for, and to set."""
        self.turn = (self.turn + 1) % TURNS
        size = numel * dtype.itemsize
        return self.turn, self._slot(self.turn, size)[:size].view(dtype)
