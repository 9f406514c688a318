"""The ops in plain PyTorch: fallback where nothing is compiled, and the oracle that kernels are tested against.

Bits are the point, so each line is one IEEE operation in fp32, and three habits of PyTorch on CPU are
avoided: `torch.sqrt` is not correctly rounded (hence the way through float64), division by a 0-dim
tensor may become a multiplication, and `lerp`, `addcmul`, `addcdiv` and `add(alpha=...)` may fuse.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from torch import Tensor

from zerolite.kernels import codec

LIMBS = 20
_UNIT = 298  # the unit of the fixed point is 2^-298, the square of the smallest subnormal


def average(sources: list[Tensor], mean: float) -> Tensor:
    """float32: `mean` times the sum of `sources` in order, rounded to their dtype."""
    total = sources[0].float()
    for source in sources[1:]:
        total = total + source.float()
    return (total * _fp32(mean)).to(sources[0].dtype).float()


def reduce_adam_(
    param: Tensor, rest: Tensor, m: Tensor, v: Tensor, sources: list[Tensor], spans: Tensor, rows: Tensor, mean: float
) -> None:
    table = rows.tolist()
    for start, stop, row in spans.tolist():
        here = slice(start, stop)
        p = join(param[here], rest[here])
        g = average([s[here] for s in sources], mean)
        p, m[here], v[here] = adam(p, g, m[here], v[here], table[row])
        split_(param[here], rest[here], p)


def adam(p: Tensor, g: Tensor, m: Tensor, v: Tensor, row: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """One update of float32 tensors by a row of hyper-parameters: the new master, first moment and second moment."""
    grad_scale, l2, decay, mix1, beta2, mix2, eps, step_size = row
    g = g * grad_scale
    if l2 != 0:
        g = g + p * l2
    p = p * decay
    m = m + (g - m) * mix1
    v = v * beta2 + (g * g) * mix2
    root = v.double().sqrt().float()
    return p - (m / (root + eps)) * step_size, m, v


def reduce_adam_moments_(
    param: Tensor,
    rest: Tensor,
    m: Tensor,
    v: Tensor,
    scales: Tensor,
    sources: list[Tensor],
    spans: Tensor,
    rows: Tensor,
    mean: float,
) -> None:
    table = rows.tolist()
    for start, stop, row in spans.tolist():
        if start % codec.GROUP:
            raise RuntimeError(f"spans: expected starts at multiples of {codec.GROUP}, got {start}")
        here = slice(start, stop)
        groups = slice(start // codec.GROUP, -(-stop // codec.GROUP))
        *hyper, step = table[row]
        p = join(param[here], rest[here])
        g = average([s[here] for s in sources], mean)
        if m.dtype == torch.bfloat16:
            p, m1, v1 = adam(p, g, m[here].float(), v[here].float(), hyper)
            dice = codec.dice_of(p, g, step)
            m[here], v[here] = codec.moment_bf16(m1, dice), codec.square_bf16(v1, dice)
        else:
            m0, v0 = codec.decode_groups(codec.padded(m[here]), codec.padded(v[here]), scales[groups])
            n = stop - start
            p, m1, v1 = adam(p, g, m0[:n], v0[:n], hyper)
            dice = codec.padded(codec.dice_of(p, g, step))
            codes_m, codes_v, scales[groups] = codec.encode_groups(codec.padded(m1), codec.padded(v1), dice)
            m[here], v[here] = codes_m[:n], codes_v[:n]
        split_(param[here], rest[here], p)


def reduce_(out: Tensor, sources: list[Tensor], mean: float, accumulate: bool) -> None:
    value = average(sources, mean)
    if accumulate:
        if out.dtype != torch.float32:
            raise RuntimeError(f"out: expected float32 to accumulate into, got {out.dtype}")
        value = out + value
    out.copy_(value)


def square_sum_(sums: Tensor, sources: list[Tensor], spans: Tensor, mean: float) -> None:
    mask = (1 << 24) - 1
    src = average(sources, mean)
    for start, stop, row in spans.tolist():
        bits = src[start:stop].view(torch.int32).long() & 0x7FFFFFFF
        exponent, fraction = bits >> 23, bits & 0x7FFFFF
        square = torch.where(exponent == 0, fraction, fraction | 0x800000) ** 2
        low = torch.zeros(256, dtype=torch.int64, device=src.device).scatter_add_(0, exponent, square & mask).tolist()
        high = torch.zeros(256, dtype=torch.int64, device=src.device).scatter_add_(0, exponent, square >> 24).tolist()
        total = sum(int(limb) << (32 * k) for k, limb in enumerate(sums[row, : LIMBS - 1].tolist()))
        total += sum(((high[e] << 24) + low[e]) << max(2 * e - 2, 0) for e in range(255))
        words = [(total >> (32 * k)) & 0xFFFFFFFF for k in range(LIMBS - 1)]
        nonfinite = int(sums[row, LIMBS - 1]) + int((exponent == 255).sum())
        sums[row] = torch.tensor([*words, nonfinite], dtype=torch.int64, device="cpu")


def reduce_squares_(out: Tensor, sums: Tensor, sources: list[Tensor], spans: Tensor, mean: float) -> None:
    reduce_(out, sources, mean, False)
    square_sum_(sums, [out], spans, 1.0)


def exceeds_(flag: Tensor, src: Tensor, limit: float) -> None:
    if not bool((src.float().abs() < _fp32(limit)).all()):
        flag.fill_(1)


def pack_(out: Tensor, grads: list[Tensor], offsets: list[int], clear: bool, flag: Tensor, limit: float) -> None:
    if clear:
        out.zero_()
    for grad, offset in zip(grads, offsets, strict=True):
        out[offset : offset + grad.numel()] = grad.reshape(-1)
        exceeds_(flag, grad, limit)


def flag_store_(flags: Tensor, place: int, value: int) -> None:
    flags[place] = value  # x86 keeps the order of stores; elsewhere the native kernels are needed (see shared.usable)


def flag_wait(flags: Tensor, places: list[int], value: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    pause = 2e-5
    while not all(int(flags[place]) >= value for place in places):
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 1e-3)
    return True


def join(param: Tensor, rest: Tensor) -> Tensor:
    """The float32 master that `param` and `rest` store together (a new tensor, or `param` itself in float32)."""
    if param.dtype == torch.bfloat16:
        return ((param.view(torch.int16).int() << 16) + rest.int()).view(torch.float32)
    return param if param.dtype == torch.float32 else rest


def split_(param: Tensor, rest: Tensor, master: Tensor) -> None:
    """Stores a float32 `master` into `param` and `rest`, lossless; bfloat16 rounds to nearest, ties away from zero.

    NaNs whose upper half would round up to a zero (a GPU's own, 0x7fffffff, is one) become another.
    """
    if param.dtype == torch.bfloat16:
        bits = master.contiguous().view(torch.int32)
        bits = torch.where(bits & 0x7FFFFFFF < 0x7FFF8000, bits, codec.NAN)
        rest.copy_(bits.to(torch.int16))
        param.view(torch.int16).copy_(((bits + 0x8000) >> 16).to(torch.int16))
        return
    if param.dtype != torch.float32:
        rest.copy_(master)
    param.copy_(master)


def square_roots(sums: Tensor) -> list[float]:
    """The square root of each row of `square_sum_` (limbs may be added over ranks), inf where it is not finite.

    Within 2 units in the last place of binary64, and a function of the exact sum alone: numpy's additions and roots
    round each element by itself.
    """
    limbs = sums.cpu().numpy().copy()
    for k in range(LIMBS - 2):
        limbs[:, k + 1] += limbs[:, k] >> 32  # carries of rows that were added
        limbs[:, k] &= 0xFFFFFFFF
    total = np.zeros(len(limbs))
    for k in range(LIMBS - 2, -1, -1):
        total = total * 2.0**32 + limbs[:, k]
    roots = np.ldexp(np.sqrt(total), -_UNIT // 2)
    return np.where(limbs[:, LIMBS - 1] != 0, math.inf, roots).tolist()


def square_root(limbs: list[int]) -> float:
    """`square_roots` of one row."""
    return square_roots(torch.tensor([limbs], device="cpu"))[0]


def _fp32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32, device="cpu").item()
