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
        for turn, slot in enumerate(self.slots):
            if size and (slot is None or slot.numel() < size):
                self.used[turn].sync()
                self.slots[turn] = self.room.zeros(size, torch.uint8)

    def lend(self, numel: int, dtype: torch.dtype) -> tuple[int, Tensor]:
        """The next slot and its number; `used` of it is for the caller to wait for, and to set."""
        self.turn = (self.turn + 1) % TURNS
        size = numel * dtype.itemsize
        slot = self.slots[self.turn]
        if slot is None or slot.numel() < size:
            self.used[self.turn].sync()
            slot = self.slots[self.turn] = self.room.zeros(size, torch.uint8)
        return self.turn, slot[:size].view(dtype)
