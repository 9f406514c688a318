"""The update of offloaded states on the device: they go up in chunks, are updated there, and come back.

host    p r m v g of chunk k+1 --up-->  slot 1            chunk k+1 goes up while chunk k is updated and comes
device                          slot 0: update chunk k    back; a slot takes its next chunk once the last one
host    p r m v of chunk k    <--down-- slot 0            has left, so two chunks are on their way at once
"""

from __future__ import annotations

import torch
from torch import Tensor

from zerolite.buffer import Link, Mark, Reached
from zerolite.layout import ALIGN
from zerolite.placement import CHUNK, SLOTS
from zerolite.update import AdamWork


class Stream:
    """Device memory for chunks on their way, and the pass over a bucket."""

    def __init__(self, link: Link, device: torch.device, chunk: int = CHUNK) -> None:
        assert chunk % ALIGN == 0
        self.link = link
        self.device = device
        self.chunk = chunk
        self.slots: list[dict[str, Tensor]] = [{} for _ in range(SLOTS)]
        self.left: list[list[Mark]] = [[] for _ in range(SLOTS)]  # what still uses a slot
        self.fresh = False  # memory was taken, which the device may still use for something before

    def _slot(self, number: int, name: str, like: Tensor) -> Tensor:
        """Device memory of one chunk's `name`."""
        slot = self.slots[number]
        size = like.numel() * like.element_size()
        if name not in slot or slot[name].numel() < size:
            slot[name] = torch.empty(size, dtype=torch.uint8, device=self.device)
            self.fresh = True
        return slot[name][:size].view(like.dtype)

    def run(
        self, work: AdamWork, param: Tensor, rest: Tensor, gradient: Tensor, own: Tensor | None, after: Mark, near: bool = False
    ) -> None:
        """Updates host tensors `param`, `rest` and the moments of `work` from `gradient`; returns when they are new.

        own    the same range of the device's parameters, written too; None: they rest on the host
        after  until then the device uses the old values of `own`
        near   `gradient` is on the device and is read there; else it comes up too
        """
        numel = param.numel()
        marks: list[Mark] = []
        if own is not None:
            after.wait()
        for number, start in enumerate(range(0, numel, self.chunk)):
            stop = min(start + self.chunk, numel)
            turn = number % SLOTS
            away = work.cut(start, stop)
            if away is None:
                continue
            host = {"param": param[start:stop], **away.moments.named()}
            host |= {"rest": rest[start:stop]} if rest.numel() else {}
            host |= {} if near else {"gradient": gradient[start:stop]}
            busy = self.left[turn]
            slot = {name: self._slot(turn, name, tensor.reshape(-1)).view(tensor.shape) for name, tensor in host.items()}
            if self.fresh:
                busy, self.fresh = [*busy, self.link.now()], False
            came = [self.link.up(slot[name], tensor, _All(busy), alone=True) for name, tensor in host.items()]
            for mark in came:
                mark.wait()
            there = away.at(slot)
            source = gradient[start:stop] if near else slot["gradient"]
            there(slot["param"], slot.get("rest", rest.new_empty(0, device=self.device)), [source], 1.0)
            if own is not None:
                own[start:stop].copy_(slot["param"])
            left = [self.link.down(host[name], slot[name]) for name in host if name != "gradient"]
            self.left[turn] = [*left, self.link.now()]
            marks += left
        for mark in marks:
            mark.sync()


class _All:
    """The last of several marks."""

    def __init__(self, marks: list[Mark]) -> None:
        self.marks = marks or [Reached()]

    def wait(self) -> None:
        for mark in self.marks:
            mark.wait()

    def sync(self) -> None:
        for mark in self.marks:
            mark.sync()

    def meet(self, other: Mark) -> None:
        for mark in self.marks:
            mark.meet(other)
