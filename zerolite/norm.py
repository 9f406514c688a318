"""Norms of the averaged gradients, by parameter, that do not depend on how parameters are cut.

The 2-norm (and 1-norm) are exact sums in fixed point, rounded once; the maximum needs no sum. Other orders
add |x|^p, rounded to binary64, exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zerolite.entry import Entry
from zerolite.kernels import LIMBS, square_sum_
from zerolite.kernels.reference import square_roots
from zerolite.layout import Piece
from zerolite.reducer import Reducer, grads_of

_WORDS = 70  # int64 words of an exact sum of binary64 values: 69 limbs of 32 bits from 2^-1126 up, and a flag


def gradient_norms(reducer: Reducer, entries: list[Entry], order: float) -> list[float]:
    """The `order`-norm of each entry's averaged gradient, factors not included; 0.0 without one (a collective).

    Every order that torch.linalg.vector_norm knows is taken. Not finite where the gradient is not.
    """
    reducer.settle("norm agreement")
    if order == 2.0:
        return _square_norms(reducer, entries)
    if math.isinf(order):
        return _extreme_norms(reducer, entries, order)
    return _power_norms(reducer, entries, order)


def _pieces(reducer: Reducer) -> list[tuple[Tensor, list[tuple[Piece, Entry]]]]:
    """Each bucket's average on this rank, and the parts of parameters in it."""
    found = []
    for bucket in reducer.order:
        grads_of(bucket).finish()
        average = grads_of(bucket).average.settled()
        if average is not None:
            found.append((average, [(piece, bucket.entries[piece.slot]) for piece in grads_of(bucket).pieces]))
    return found


def _square_norms(reducer: Reducer, entries: list[Entry]) -> list[float]:
    sums = torch.zeros(len(entries), LIMBS, dtype=torch.int64, device=reducer.suspect.device)
    away = torch.zeros(len(entries) if reducer.plan.states.home == "host" else 0, LIMBS, dtype=torch.int64, device="cpu")
    for bucket in reducer.order:
        grads, average = grads_of(bucket), grads_of(bucket).average
        average.asked = True
        if not grads.lone:
            grads.finish()
        squares = average.squares
        if squares is not None:  # counted as the gradients went by
            if squares.device.type == "cpu":
                average.coming.sync()
            into = sums if squares.device == sums.device else away
            into.index_add_(0, bucket.spans[:, 2].to(into.device), squares)
            continue
        sources, mean = grads.peek()
        if bucket.spans.numel() and sources:
            square_sum_(sums if sources[0].device == sums.device else away, sources, bucket.spans, mean)
    if len(away):
        sums += away.to(sums.device)
    reducer.comm.sum_(sums, "norm 2")
    return square_roots(sums)


def _extreme_norms(reducer: Reducer, entries: list[Entry], order: float) -> list[float]:
    sign = 1.0 if order > 0 else -1.0
    found = torch.full((len(entries),), -math.inf, dtype=torch.float64, device="cpu")
    for average, parts in _pieces(reducer):
        for piece, entry in parts:
            part = average[piece.offset : piece.offset + piece.stop - piece.start].abs()
            value = float(part.amax() if order > 0 else part.amin()) * sign
            found[entry.index] = math.inf if math.isnan(value) else max(float(found[entry.index]), value)
    reducer.comm.max_(found, f"norm {order}")
    return [0.0 if value == -math.inf else sign * value for value in found.tolist()]


def _power_norms(reducer: Reducer, entries: list[Entry], order: float) -> list[float]:
    sums = torch.zeros(len(entries), _WORDS, dtype=torch.int64, device="cpu")
    for average, parts in _pieces(reducer):
        for piece, entry in parts:
            x = average[piece.offset : piece.offset + piece.stop - piece.start].double().abs()
            sums[entry.index] += exact_sum(_power(x, order))
    reducer.comm.sum_(sums, f"norm {order}")
    totals = [_value(row) for row in sums.tolist()]
    if order == 0.0:
        return totals
    return [total ** (1.0 / order) if total > 0 else 0.0 for total in totals]


def _power(x: Tensor, order: float) -> Tensor:
    """|x|^order; small whole orders by multiplication, which rounds alike in vector and scalar loops."""
    if order == 0.0:
        return (x != 0).double()
    if order in (1.0, 2.0, 3.0, 4.0):
        result = x
        for _ in range(int(order) - 1):
            result = result * x
        return result
    return x.pow(order)


def exact_sum(values: Tensor) -> Tensor:
    """The exact sum of non-negative float64 values: int64 [70], 69 limbs in units of 2^-1126 and a non-finite count.

    Limbs are below 2^32, so rows of many ranks can be added as integers.
    """
    values = values.cpu()
    mantissa, exponent = torch.frexp(values)  # value = mantissa * 2^exponent, mantissa in [0.5, 1)
    finite = torch.isfinite(values)
    mantissa, exponent = torch.where(finite, mantissa, 0.0), torch.where(finite, exponent, 0).long()
    whole = (mantissa * 2.0**53).long()
    bins = (exponent + 1073).clamp(min=0)  # value = whole * 2^(exponent - 53); the smallest exponent is -1073
    low = torch.zeros(2098, dtype=torch.int64, device="cpu").scatter_add_(0, bins, whole & 0x3FFFFFF)
    high = torch.zeros(2098, dtype=torch.int64, device="cpu").scatter_add_(0, bins, whole >> 26)
    used = torch.nonzero(low | high).flatten().tolist()
    total = sum(((int(high[k]) << 26) + int(low[k])) << k for k in used)
    words = [(total >> (32 * k)) & 0xFFFFFFFF for k in range(_WORDS - 1)]
    return torch.tensor([*words, int((~finite).sum())], dtype=torch.int64, device="cpu")


def _value(row: list[int]) -> float:
    if row[-1]:
        return math.inf
    total = sum(limb << (32 * k) for k, limb in enumerate(row[:-1]))
    drop = max(total.bit_length() - 128, 0)  # int to float rounds correctly; 128 bits keep ldexp in range
    try:
        return math.ldexp(float(total >> drop), drop - 1126)
    except OverflowError:
        return math.inf
