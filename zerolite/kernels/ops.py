"""Schemas of the `zerolite::` ops, one place, and their default implementation.

All tensors of one call live on one device, but for `spans` and `rows`: small tables, best on the host, because a CUDA
call reads them back (and waits) to check them. Elementwise tensors are 1D, contiguous and of equal length.
An index tensor `spans` is int64 of shape (n, 3): start, stop, and a row of another argument.
"""

from __future__ import annotations

import functools
from array import array
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from zerolite.kernels import reference

#: Columns of `rows` in `reduce_adam_`, in the order of `AdamRow` in csrc/adam_math.h.
ADAM_ROW = ("grad_scale", "l2", "decay", "mix1", "beta2", "mix2", "eps", "step_size")
#: Columns of `rows` in `reduce_adam_moments_`, in the order of `MomentRow` in csrc/moments_math.h.
MOMENT_ROW = (*ADAM_ROW, "step")
#: int64 words of one exact sum of squares: 19 limbs of 32 bits in units of 2^-298, then the non-finite count.
LIMBS = reference.LIMBS

_dtype, _is_cpu = attrgetter("dtype"), attrgetter("is_cpu")

_library = torch.library.Library("zerolite", "DEF")
_library.define(
    "reduce_adam_(Tensor(a!) param, Tensor(b!) rest, Tensor(c!) m, Tensor(d!) v, Tensor[] sources, "
    "Tensor spans, Tensor rows, float mean) -> ()"
)
_library.define(
    "reduce_adam_moments_(Tensor(a!) param, Tensor(b!) rest, Tensor(c!) m, Tensor(d!) v, Tensor(e!) scales, "
    "Tensor[] sources, Tensor spans, Tensor rows, float mean) -> ()"
)
_library.define("reduce_(Tensor(a!) out, Tensor[] sources, float mean, bool accumulate) -> ()")
_library.define("square_sum_(Tensor(a!) sums, Tensor[] sources, Tensor spans, float mean) -> ()")
_library.define("reduce_squares_(Tensor(a!) out, Tensor(b!) sums, Tensor[] sources, Tensor spans, float mean) -> ()")
_library.define("exceeds_(Tensor(a!) flag, Tensor src, float limit) -> ()")
_library.define("pack_(Tensor(a!) out, Tensor[] grads, int[] offsets, bool clear, Tensor(b!) flag, float limit) -> ()")
_library.define(
    "pack_at_(Tensor(a!) out, Tensor places, bool clear, Tensor(b!) flag, float limit, int start, int width, int stride) -> ()"
)
_library.define("flag_store_(Tensor(a!) flags, int place, int value) -> ()")
_library.define("flag_wait(Tensor flags, int[] places, int value, float seconds) -> bool")
_library.define("use_isa(str name) -> bool")
_library.define("isa() -> str")
_library.define("threads(int count) -> int")

_library.impl("flag_store_", reference.flag_store_, "CompositeExplicitAutograd")
_library.impl("flag_wait", reference.flag_wait, "CompositeExplicitAutograd")
for _name in ("reduce_adam_", "reduce_adam_moments_", "reduce_", "square_sum_", "reduce_squares_", "exceeds_", "pack_"):
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"zerolite::{_name}", lambda *_: None, lib=_library)


def reduce_adam_(
    param: Tensor,
    rest: Tensor,
    m: Tensor,
    v: Tensor,
    sources: list[Tensor],
    spans: Tensor,
    rows: Tensor,
    mean: float,
) -> None:
    """Sums `sources` in order in fp32, averages, and applies Adam in place, in one pass over memory.

    param    compute dtype: float32, bfloat16 or float16
    rest     empty for float32; int16 remainder of bfloat16; float32 master of float16
    m, v     float32 moments
    sources  N tensors of one dtype, the same element range of N ranks' gradients; the average is
             rounded to this dtype, as if one device had computed it
    spans    elements to update, disjoint, and the row that holds their hyper-parameters
    rows     float32 of shape (n, len(ADAM_ROW))
    mean     factor of the sum, 1 / world size

    Raises RuntimeError where a shape or dtype differs. Source: Kingma & Ba 2015, algorithm 1;
    Loshchilov & Hutter 2019, algorithm 2.
    """
    torch.ops.zerolite.reduce_adam_(param, rest, m, v, sources, spans, rows, mean)


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
    """`reduce_adam_` with moments that are stored in fewer bits: decoded, updated and encoded in the same pass.

    m, v     both uint8, or both bfloat16; see `codec`
    scales   uint8 of shape (groups of 64 elements, 2) for uint8 moments; else empty
    spans    starts are multiples of 64; a span that ends inside of a group is followed by zeros in that group
    rows     float32 of shape (n, len(MOMENT_ROW)); the step feeds the rounding

    Raises RuntimeError where a shape or dtype differs.
    """
    torch.ops.zerolite.reduce_adam_moments_(param, rest, m, v, scales, sources, spans, rows, mean)


def reduce_(out: Tensor, sources: list[Tensor], mean: float, accumulate: bool) -> None:
    """out = average of `sources` (rounded to their dtype); with `accumulate`, out (float32) += average."""
    torch.ops.zerolite.reduce_(out, sources, mean, accumulate)


def square_sum_(sums: Tensor, sources: list[Tensor], spans: Tensor, mean: float) -> None:
    """sums[row] += sum of squares of each span of the average of `sources`, exactly: the result does not depend on the cut.

    sums     int64 of shape (n, LIMBS), fixed point; `reference.square_root` reads it
    sources  tensors of one dtype, averaged and rounded as by `reduce_`
    """
    torch.ops.zerolite.square_sum_(sums, sources, spans, mean)


def reduce_squares_(out: Tensor, sums: Tensor, sources: list[Tensor], spans: Tensor, mean: float) -> None:
    """`reduce_` without accumulation, and `square_sum_` of what it writes, in one pass; out has the sources' dtype.

    spans  in order, disjoint
    """
    if out.dtype != sources[0].dtype:  # else what is written is rounded again, and squares differ
        raise RuntimeError(f"out: expected {sources[0].dtype}, the dtype of the sources, got {out.dtype}")
    torch.ops.zerolite.reduce_squares_(out, sums, sources, spans, mean)


def exceeds_(flag: Tensor, src: Tensor, limit: float) -> None:
    """flag[0] = 1 where an element of `src` is NaN or has a magnitude of `limit` or more; else untouched."""
    torch.ops.zerolite.exceeds_(flag, src, limit)


class Window(NamedTuple):
    """What `pack_` keeps of a longer tensor: of every `stride` elements, `width` from `start` on, one after the other."""

    start: int
    width: int
    stride: int


class Packing:
    """Gradients that are copied into one tensor, or into windows of it one after the other: what is asked of each gradient is
    asked once. Of thousands of small ones that takes longer than the copy.

    grads         contiguous, of `dtype` on `device`; kept until this is dropped
    offsets       of each in the (longer) tensor

    Raises RuntimeError where they are not.
    """

    def __init__(self, grads: list[Tensor], offsets: list[int], dtype: torch.dtype, device: torch.device) -> None:
        if len(offsets) != len(grads):
            raise RuntimeError(f"offsets: expected {len(grads)}, one for each gradient, got {len(offsets)}")
        if any(map(Tensor.is_neg, grads)):  # a view of the imaginary part of a conjugate: memory has the other sign
            grads = list(map(Tensor.resolve_neg, grads))
        self.grads, self.offsets = grads, offsets
        self.places: Tensor | None = None
        if grads and device.type == "cpu" and _by_address():
            if not (set(map(_dtype, grads)) == {dtype} and all(map(Tensor.is_contiguous, grads)) and all(map(_is_cpu, grads))):
                raise RuntimeError("grads: expected contiguous tensors of the dtype and device of out")
            columns = array("q", chain(offsets, map(Tensor.numel, grads), map(Tensor.data_ptr, grads)))
            self.places = torch.frombuffer(columns, dtype=torch.int64).view(3, -1)

    def into(self, out: Tensor, clear: bool, flag: Tensor, limit: float, window: Window | None = None) -> None:
        """Copies them; see `pack_`."""
        start, width, stride = window or (0, out.numel(), out.numel())
        if self.places is not None:
            torch.ops.zerolite.pack_at_(out, self.places, clear, flag, limit, start, width, stride)
            return
        grads, offsets = self.grads, self.offsets
        if width != stride:
            grads, offsets = _inside(grads, offsets, start, width, stride)
        torch.ops.zerolite.pack_(out, grads, offsets, clear, flag, limit)


def pack_(
    out: Tensor, grads: list[Tensor], offsets: list[int], clear: bool, flag: Tensor, limit: float, window: Window | None = None
) -> None:
    """Copies each contiguous gradient to out[offset : offset + numel]; dtypes are equal.

    clear        elements of `out` that no gradient covers become 0; else they stay
    flag, limit  as `exceeds_` for the gradients, in the same pass
    window       offsets are those of a longer tensor, of which `out` is this window; None: of `out`
    """
    Packing(grads, offsets, out.dtype, out.device).into(out, clear, flag, limit, window)


def _inside(grads: list[Tensor], offsets: list[int], start: int, width: int, stride: int) -> tuple[list[Tensor], list[int]]:
    """The parts of gradients in a window, and where they go."""
    parts, places = [], []
    for grad, offset in zip(grads, offsets, strict=True):
        flat = grad.reshape(-1)
        for row in range(offset // stride, (offset + flat.numel() - 1) // stride + 1):
            first = row * stride + start
            lo, hi = max(offset, first), min(offset + flat.numel(), first + width)
            if lo < hi:
                parts.append(flat[lo - offset : hi - offset])
                places.append(lo - first + row * width)
    return parts, places


@functools.cache
def _by_address() -> bool:
    """Whether the native library is there, which takes gradients by address."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("zerolite::pack_at_", "CPU")


def flag_store_(flags: Tensor, place: int, value: int) -> None:
    """flags[place] = value (int64, shared memory), after everything that this thread wrote before."""
    torch.ops.zerolite.flag_store_(flags, place, value)


def flag_wait(flags: Tensor, places: list[int], value: int, seconds: float) -> bool:
    """Whether flags[place] >= value for all places within `seconds`; what was written before them is then visible."""
    return torch.ops.zerolite.flag_wait(flags, places, value, seconds)
