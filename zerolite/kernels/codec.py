"""Stored moments in plain PyTorch: csrc/moments_math.h said again, operation by operation.

A group is GROUP elements of one parameter with a scale for each moment. docs/moments.md draws the formats.

    first moment     s eeee fff   1 sign, 4 exponent, 3 fraction bits; field 0 underflows gradually
    second moment    eeeee fff    5 exponent, 3 fraction bits; code 0 is 0
    scales           (groups, 2)  a byte each: the group's highest binade

`dice` are 32 uniform bits an element, in int64. Codes round by the high ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 64
NEAREST = 0x80000000  # dice with which codes round to nearest, ties up
LARGEST = 0x7E800000  # bits of 2^126, where stored second moments end
NAN = 0x7FC00000  # what every NaN is stored as: a GPU's own, 0x7fffffff, would round up to a zero
DROPPED = 20  # fraction bits of binary32 that codes leave out
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Minifloat:
    """Magnitudes with 3 fraction bits under an exponent of `fields` values, relative to a scale."""

    fields: int

    @property
    def lowest(self) -> int:
        """The biased binary32 exponent that scale 0 stands for."""
        return self.fields + 2

    def scale(self, top: Tensor) -> Tensor:
        """Scales of groups whose largest magnitudes have these bits."""
        return (((top + (1 << DROPPED) - 1) >> 23) - self.lowest).clamp(min=0)

    def to_units(self, scale: Tensor) -> Tensor:
        """The factor from values to units, a power of two."""
        return _float((254 + self.fields - self.lowest - scale.long()) << 23)

    def from_units(self, scale: Tensor) -> Tensor:
        """The factor from units to values, a power of two."""
        return _float((self.lowest - self.fields + scale.long()) << 23)


MOMENT = Minifloat(16)
SQUARE = Minifloat(32)


def encode_moment(m: Tensor, units: Tensor, dice: Tensor | int) -> Tensor:
    """Codes (int64) of float32 values."""
    bits = _bits(m)
    y = _float(bits & 0x7FFFFFFF) * units
    code = _bits(torch.maximum(y, y * 0.5 + 2.0)) + (dice >> (32 - DROPPED))
    return torch.where(m.isnan(), NAN >> DROPPED & 127, ((code >> DROPPED) & 127) | (bits >> 31 << 7))


def decode_moment(code: Tensor, units: Tensor) -> Tensor:
    """float32 values of codes."""
    y = _float(((code.long() & 127) << DROPPED) + (128 << 23))
    return _float(_bits(torch.minimum(y, (y + y) - 4.0) * units) | (code.long() >> 7 << 31))


def encode_square(v: Tensor, units: Tensor, dice: Tensor | int) -> Tensor:
    """Codes (int64) of float32 values of at least 0."""
    bits = _bits(v * units)
    least = (128 << 23) + (1 << DROPPED)
    code = (bits.clamp(min=least) + (dice >> (32 - DROPPED))) >> DROPPED
    return torch.where(bits == 0, 0, code & 255)


def decode_square(code: Tensor, units: Tensor) -> Tensor:
    """float32 values of codes."""
    y = _float((code.long() << DROPPED) + (128 << 23)) * units
    return torch.where(code == 0, 0.0, y)


def encode_groups(m: Tensor, v: Tensor, dice: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes of both moments, and their scales; of 1D float32 tensors of whole groups."""
    square = _bits(v).clamp(max=LARGEST)
    size = (_bits(m) & 0x7FFFFFFF).clamp(max=NAN)
    top_m, top_v = (bits.view(-1, GROUP).amax(1) for bits in (size, square))
    scales = torch.stack([MOMENT.scale(top_m), SQUARE.scale(top_v)], 1).to(torch.uint8)
    codes_m = encode_moment(m, spread(MOMENT.to_units(scales[:, 0])), dice)
    codes_v = encode_square(_float(square), spread(SQUARE.to_units(scales[:, 1])), dice)
    return codes_m.to(torch.uint8), codes_v.to(torch.uint8), scales


def decode_groups(m: Tensor, v: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """float32 moments of uint8 codes of whole groups."""
    unit_m, unit_v = spread(MOMENT.from_units(scales[:, 0])), spread(SQUARE.from_units(scales[:, 1]))
    return decode_moment(m, unit_m), decode_square(v, unit_v)


def dice_of(p: Tensor, g: Tensor, step: float) -> Tensor:
    """32 bits an element that look uniform: a hash of master, gradient and step, of no position."""
    salt = int(_bits(torch.tensor([step], dtype=torch.float32, device="cpu"))) * 0x9E3779B1 & _WORD
    turned = (_bits(g) << 16 | _bits(g) >> 16) & _WORD
    return _times(_bits(p) ^ salt ^ turned, 0x85EBCA6B)


def moment_bf16(m: Tensor, dice: Tensor | int) -> Tensor:
    """bfloat16 of float32, rounded by the high half of `dice`."""
    return _bf16((torch.where(m.isnan(), NAN, _bits(m)) + (dice >> 16)) >> 16)


def square_bf16(v: Tensor, dice: Tensor | int) -> Tensor:
    """bfloat16 of a second moment, rounded by both halves of `dice`; above 0 where v is, below infinity."""
    bits = _bits(v).clamp(max=LARGEST)
    code = (bits + ((dice ^ dice >> 16) & 0xFFFF)) >> 16
    return _bf16(torch.maximum(code, (bits > 0).long()))


def spread(scales: Tensor) -> Tensor:
    """One value a group to one an element."""
    return scales.repeat_interleave(GROUP)


def padded(t: Tensor) -> Tensor:
    """A copy with zeros up to whole groups."""
    return torch.nn.functional.pad(t, (0, -t.numel() % GROUP))


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int32).long() & _WORD


def _float(bits: Tensor) -> Tensor:
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().view(torch.float32)


def _bf16(code: Tensor) -> Tensor:
    return torch.where(code >= 1 << 15, code - (1 << 16), code).short().view(torch.bfloat16)


def _times(h: Tensor, factor: int) -> Tensor:
    """Products modulo 2^32, in two halves: int64 does not hold them."""
    return ((h & 0xFFFF) * factor + ((h >> 16) * (factor & 0xFFFF) << 16)) & _WORD
