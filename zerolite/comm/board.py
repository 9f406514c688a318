"""Small values of all ranks of one host, summed or compared in shared memory: no message, and no thread that carries it.

    | slots of odd turns: what, bytes | ... of even turns | flags: the last turn written, for each rank |

A rank writes its slot and raises its flag; who sees all flags reads all slots. Two turns suffice: whoever writes a slot again
has seen every rank come to the turn between, after it had read this one. Each slot says what it is for, so ranks on
different paths find out instead of mixing their values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zerolite.comm.flags import Flags
from zerolite.comm.segment import Segment

if TYPE_CHECKING:
    from zerolite.comm.shared import SharedComm

MOST = 1 << 18  # bytes of values in a slot; pages take memory once they are written
_WHAT = 120  # bytes of text, followed by the length of the values


class Board:
    """Slots of every rank of the host."""

    def __init__(self, comm: SharedComm) -> None:
        self.comm = comm
        width, flags = _WHAT + 8 + MOST, Flags.nbytes(comm.places)
        size = 2 * comm.places * width
        self.segment = Segment(size + flags, comm.place, comm.share_here, private=False)
        self.slots = self.segment.shared[:size].view(2, comm.places, width)
        self.flags = Flags(comm, self.segment.shared[size : size + flags])
        self.turn = 0

    @staticmethod
    def fits(values: Tensor) -> bool:
        """Whether a slot holds `values`."""
        return values.numel() * values.element_size() <= MOST

    def meet(self, values: Tensor, what: str) -> Tensor:
        """Every rank's values: shape (ranks, numel), on the CPU, until the turn after the next.

        Raises RankError where ranks came for different things.
        """
        self.comm.group.check(what)
        self.turn += 1
        slots = self.slots[self.turn % 2]
        used = values.numel() * values.element_size()
        text = what.encode()[:_WHAT].ljust(_WHAT, b"\0") + used.to_bytes(8, "little")
        own = slots[self.comm.place]
        own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        own[len(text) : len(text) + used].view(values.dtype).copy_(values.reshape(-1))
        self.flags.raise_to(self.turn)
        self.flags.wait(self.turn, what)
        texts = slots[:, : len(text)]
        if not bool((texts == own[: len(text)]).all()):
            raise self.comm.group.disagreement([_said(row) for row in texts])
        return slots[:, len(text) : len(text) + used].view(values.dtype)


def _said(row: Tensor) -> str:
    text = bytes(row.tolist())
    return f"{text[:_WHAT].rstrip(bytes(1)).decode(errors='replace')} ({int.from_bytes(text[_WHAT:], 'little')} bytes)"
