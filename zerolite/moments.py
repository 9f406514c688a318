"""How Adam's two moments are stored: fp32, bf16, or a byte each with scales a group of 64 elements."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from zerolite.buffer import Room
from zerolite.kernels import codec, reduce_adam_, reduce_adam_moments_


class Moments(Protocol):
    """Both moments of one element range of a bucket. The range starts at a group's first element."""

    width: int  # bytes an element
    group_width: int  # bytes a group of layout.ALIGN elements, beside

    def __init__(self, numel: int, room: Room) -> None: ...

    def update(
        self, param: Tensor, rest: Tensor, sources: list[Tensor], spans: Tensor, rows: list[tuple[float, ...]], mean: float
    ) -> None:
        """One pass of Adam; rows have the columns `kernels.MOMENT_ROW`."""
        ...

    def read(self, part: slice) -> tuple[Tensor, Tensor]:
        """First and second moment of a piece in float32: views, or what is decoded."""
        ...

    def write(self, part: slice, m: Tensor, v: Tensor) -> None:
        """Replaces the moments of a piece; what read() gave is stored as it was."""
        ...

    def tensors(self) -> list[Tensor]: ...

    def named(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        ...

    def part(self, start: int, stop: int) -> Moments:
        """A view of whole groups."""
        ...

    def at(self, tensors: dict[str, Tensor]) -> Moments:
        """The same kind over other tensors, by the names of `named`."""
        ...


class _Stored:
    """Moments as tensors: m, v and perhaps scales."""

    m: Tensor
    v: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.m, self.v]

    def named(self) -> dict[str, Tensor]:
        return {"m": self.m, "v": self.v}

    def part(self, start: int, stop: int) -> Any:
        return self.at({"m": self.m[start:stop], "v": self.v[start:stop]})

    def at(self, tensors: dict[str, Tensor]) -> Any:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.__dict__.update({name: tensors[name] for name in self.named()})
        return other


class FloatMoments(_Stored):
    """float32."""

    width, group_width = 8, 0

    def __init__(self, numel: int, room: Room) -> None:
        self.m = room.zeros(numel, torch.float32)
        self.v = room.zeros(numel, torch.float32)

    def update(
        self, param: Tensor, rest: Tensor, sources: list[Tensor], spans: Tensor, rows: list[tuple[float, ...]], mean: float
    ) -> None:
        table = torch.tensor([row[:-1] for row in rows], dtype=torch.float32, device="cpu")
        reduce_adam_(param, rest, self.m, self.v, sources, spans, table, mean)

    def read(self, part: slice) -> tuple[Tensor, Tensor]:
        return self.m[part], self.v[part]

    def write(self, part: slice, m: Tensor, v: Tensor) -> None:
        self.m[part], self.v[part] = m, v


class _Rounded(_Stored):
    """What rounded moments share: the op that decodes, updates and encodes."""

    scales: Tensor  # empty where a moment needs none

    def update(
        self, param: Tensor, rest: Tensor, sources: list[Tensor], spans: Tensor, rows: list[tuple[float, ...]], mean: float
    ) -> None:
        table = torch.tensor(rows, dtype=torch.float32, device="cpu")
        reduce_adam_moments_(param, rest, self.m, self.v, self.scales, sources, spans, table, mean)


class BFloatMoments(_Rounded):
    """bfloat16, rounded up or down at random by the update (see docs/moments.md)."""

    width, group_width = 4, 0

    def __init__(self, numel: int, room: Room) -> None:
        self.m = room.zeros(numel, torch.bfloat16)
        self.v = room.zeros(numel, torch.bfloat16)
        self.scales = torch.empty(0, dtype=torch.uint8, device=room.device)

    def read(self, part: slice) -> tuple[Tensor, Tensor]:
        return self.m[part].float(), self.v[part].float()

    def write(self, part: slice, m: Tensor, v: Tensor) -> None:
        self.m[part] = codec.moment_bf16(m, codec.NEAREST)
        self.v[part] = codec.square_bf16(v, codec.NEAREST)

    def at(self, tensors: dict[str, Tensor]) -> Any:
        other = super().at(tensors)
        other.scales = self.scales.to(other.m.device)
        return other


class ByteMoments(_Rounded):
    """A byte for each moment, and two scales of a byte for each group."""

    width, group_width = 2, 2

    def __init__(self, numel: int, room: Room) -> None:
        assert numel % codec.GROUP == 0, "ranges are whole groups"
        self.m = room.zeros(numel, torch.uint8)
        self.v = room.zeros(numel, torch.uint8)
        self.scales = room.zeros(numel // codec.GROUP * 2, torch.uint8).view(-1, 2)

    def read(self, part: slice) -> tuple[Tensor, Tensor]:
        whole, groups = _whole(part)
        m, v = codec.decode_groups(self.m[whole], self.v[whole], self.scales[groups])
        n = part.stop - part.start
        return m[:n], v[:n]

    def write(self, part: slice, m: Tensor, v: Tensor) -> None:
        whole, groups = _whole(part)
        codes = codec.encode_groups(codec.padded(m), codec.padded(v), codec.NEAREST)
        self.m[whole], self.v[whole], self.scales[groups] = codes

    def tensors(self) -> list[Tensor]:
        return [self.m, self.v, self.scales]

    def named(self) -> dict[str, Tensor]:
        return {"m": self.m, "v": self.v, "scales": self.scales}

    def part(self, start: int, stop: int) -> Any:
        groups = slice(start // codec.GROUP, -(-stop // codec.GROUP))
        return self.at({"m": self.m[start:stop], "v": self.v[start:stop], "scales": self.scales[groups]})


def _whole(part: slice) -> tuple[slice, slice]:
    """The elements of the groups that a piece begins with its first element and has for itself, and their groups."""
    groups = slice(part.start // codec.GROUP, -(-part.stop // codec.GROUP))
    return slice(groups.start * codec.GROUP, groups.stop * codec.GROUP), groups


MOMENTS: dict[str, type[Moments]] = {"fp32": FloatMoments, "bf16": BFloatMoments, "int8": ByteMoments}
