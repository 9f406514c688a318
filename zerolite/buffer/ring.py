"""Memory of what is on its way: lent in turns, or kept until it has left."""

from __future__ import annotations

import torch
from torch import Tensor

from zerolite.buffer.link import Link, Mark, Reached
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


class Leaving:
    """A device tensor that is copied to the host, kept until the device waits for the copy.

        send(a)     a is copied while the device computes b
        clear()     what the device does from now on comes after the copy: a is free
        send(b)

    So one is on its way, however far the host runs ahead of the device. (The allocator, told that another stream reads a
    tensor, would keep each until the host sees its copy done.)
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.tensor: Tensor | None = None
        self.mark: Mark = Reached()

    def send(self, out: Tensor, source: Tensor) -> Mark:
        """Copies `source` to `out`, after `clear`."""
        self.clear()
        self.tensor, self.mark = source, self.link.down(out, source, kept=True)
        return self.mark

    def clear(self) -> None:
        """Lets go of what was sent."""
        self.mark.wait()
        self.tensor, self.mark = None, Reached()
