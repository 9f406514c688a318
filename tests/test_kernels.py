"""Kernels against the reference: every instruction set, sizes around the vector width, misaligned starts."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zerolite import host, kernels
from zerolite.kernels import ops, reference
from zerolite.kernels.ops import ADAM_ROW, LIMBS
from zerolite.norm import _value, exact_sum

SIZES = [0, 1, 3, 5, 12, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 65537]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = torch.tensor(
    [[0.7, 0.0, 0.999, 0.1, 0.999, 0.001, 1e-8, 1e-3], [-1.0, 0.01, 1.0, 0.1, 0.95, 0.05, 1e-6, 1e-2]], dtype=torch.float32
)


def available():
    found = []
    for isa in ("baseline", "avx2", "avx512", "avx512vbmi"):
        try:
            kernels.set_isa(isa)
            found.append(isa)
        except ValueError:
            continue
    if found:
        kernels.set_isa("auto")
    return found


ISAS = available()


@pytest.fixture(params=ISAS)
def isa(request):
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa("auto")


def wide(n, seed, scale=4.0):
    """Values over many magnitudes."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=g) * torch.exp(torch.randn(n, generator=g) * scale)


def shifted(t, by):
    """The same values at a misaligned address."""
    room = torch.empty(t.numel() + by, dtype=t.dtype)
    room[by:] = t
    return room[by:]


def adam_tensors(n, dtype, by=0):
    master = wide(n, 1, 2.0)
    param = torch.empty(n, dtype=dtype)
    rest = torch.empty(0 if dtype == torch.float32 else n, dtype=torch.int16 if dtype == torch.bfloat16 else torch.float32)
    reference.split_(param, rest, master)
    m, v = wide(n, 2) * 1e-3, (wide(n, 3) * 1e-3) ** 2
    return [shifted(t, by) if t.numel() else t for t in (param, rest, m, v)]


def bits(t):
    return t.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        nan = torch.isnan(a) & torch.isnan(b) if a.is_floating_point() else torch.zeros_like(a, dtype=torch.bool)
        assert torch.equal(bits(a)[~nan], bits(b)[~nan])


def test_native_kernels_are_built():
    assert ISAS, "the native library is missing: make setup builds it"


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_reduce_adam(isa, n, dtype, count):
    by = 1 if n % 2 else 3
    sources = [shifted(wide(n, 10 + k, 2.0).to(dtype), by) for k in range(count)]
    cut = n // 3
    spans = torch.tensor([[0, cut, 0], [cut, cut, 1], [min(cut + 1, n), n, 1]])
    ours, theirs = adam_tensors(n, dtype, by), adam_tensors(n, dtype)
    kernels.reduce_adam_(*ours, sources, spans, ROWS, 1 / count)
    reference.reduce_adam_(*theirs, sources, spans, ROWS, 1 / count)
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduce_adam_with_fp32_gradients_of_narrow_parameters(isa, dtype):
    n = 1025
    sources = [wide(n, 4), wide(n, 5)]
    ours, theirs = adam_tensors(n, dtype), adam_tensors(n, dtype)
    for tensors, op in ((ours, kernels.reduce_adam_), (theirs, reference.reduce_adam_)):
        op(*tensors, sources, torch.tensor([[0, n, 0]]), ROWS, 0.5)
    assert_same(ours, theirs)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-38, 3e38, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_adam_special_values(isa, value, dtype):
    n = 70
    sources = [torch.full((n,), value).to(dtype), torch.full((n,), 1.0).to(dtype)]
    ours, theirs = adam_tensors(n, dtype), adam_tensors(n, dtype)
    for tensors, op in ((ours, kernels.reduce_adam_), (theirs, reference.reduce_adam_)):
        op(*tensors, sources, torch.tensor([[0, n, 0]]), ROWS, 0.5)
    assert_same(ours, theirs)


@pytest.mark.parametrize("grads", [torch.bfloat16, torch.float32])
def test_updates_of_bfloat16_have_the_bits_of_plain_loops(isa, grads):
    """Sizes around pieces of 64, ranges that begin anywhere, values that are not finite, with a decay in the gradient."""
    make = torch.Generator().manual_seed(7)
    odd = torch.tensor([math.nan, math.inf, -math.inf, 3e38, 1e-45, -0.0])
    for trial in range(120):
        n, count = (
            [1, 63, 64, 65, 127, 128, 129, 192, 321, 1000][trial % 10],
            [1, 1, 2, 3, 9][trial % 5 if trial < 60 else -1 - trial % 5],
        )
        start, mean = min(n - 1, [0, 0, 64, 3][trial % 4]), [1.0 / count, 1.0, 0.5][trial % 3]
        values = [torch.randn(n, generator=make) * 1e-3 for _ in range(count + 3)]
        for value in values[: 1 + trial % 3]:
            value[int(torch.randint(n, (1,), generator=make))] = odd[trial % 6]
        sources, rows = [value.to(grads) for value in values[:count]], ROWS.clone()
        rows[:, 1] = [0.0, 0.1][trial % 2]
        found = []
        for table in ("baseline", kernels.kernels_in_use()):
            kernels.set_isa(table)
            param, rest = torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.int16)
            reference.split_(param, rest, values[-1] * 1e3)
            found.append([param, rest, values[-2].clone(), values[-3].abs()])
            kernels.reduce_adam_(*found[-1], sources, torch.tensor([[start, n, 0]]), rows, mean)
        assert_same(*found)


#: Bits of NaNs: the plain one, what x86 computes, a GPU's own, the same below 0, and two that bf16 gradients hold.
NANS = [0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFF0000, 0xFFFF0000]


def float_of(pattern):
    return torch.tensor([pattern]).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("pattern", NANS)
def test_a_bfloat16_parameter_shows_every_nan(isa, pattern):
    """The upper half of 0x7fffffff rounds up to a zero."""
    nan, spans = float_of(pattern).repeat(70), torch.tensor([[0, 70, 0]])
    for op in (kernels.reduce_adam_, reference.reduce_adam_):
        param, rest, m, v = adam_tensors(70, torch.bfloat16)
        op(param, rest, m, v, [nan], spans, ROWS, 1.0)
        assert bool(param.isnan().all())
        op(param, rest, m, v, [torch.ones(70)], spans, ROWS, 1.0)
        assert bool(param.isnan().all())


@pytest.mark.parametrize("pattern", NANS)
@pytest.mark.parametrize("which", ["m", "v"])
def test_a_bfloat16_parameter_shows_every_nan_of_its_moments(isa, pattern, which):
    """A checkpoint that a GPU wrote may hold them."""
    for op in (kernels.reduce_adam_, reference.reduce_adam_):
        param, rest, m, v = adam_tensors(70, torch.bfloat16)
        (m if which == "m" else v).copy_(float_of(pattern).expand(70))
        op(param, rest, m, v, [torch.ones(70, dtype=torch.bfloat16)], torch.tensor([[0, 70, 0]]), ROWS, 1.0)
        assert bool(param.isnan().all())


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_reduce(isa, n, dtype, accumulate):
    sources = [shifted(wide(n, k).to(dtype), k) for k in range(1, 4)]
    outs = [torch.ones(n, dtype=torch.float32 if accumulate else dtype) for _ in range(2)]
    kernels.reduce_(outs[0], sources, 1 / 3, accumulate)
    reference.reduce_(outs[1], sources, 1 / 3, accumulate)
    assert_same(outs[:1], outs[1:])


@pytest.mark.parametrize("shift", [0, 1, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_of_what_goes_past_the_caches(isa, dtype, shift):
    """From 1 MiB on (kUncached); `shift` elements from a line's beginning."""
    n = 600_011
    sources = [wide(n, k).to(dtype) for k in range(2)]
    outs = [torch.full((n + 64,), 7.0, dtype=dtype)[shift : shift + n] for _ in range(3)]
    sums = [torch.zeros(1, LIMBS, dtype=torch.int64) for _ in range(2)]
    spans = torch.tensor([[0, n, 0]])
    kernels.set_threads(2)
    kernels.reduce_(outs[0], sources, 0.5, False)
    kernels.reduce_squares_(outs[1], sums[0], sources, spans, 0.5)
    reference.reduce_(outs[2], sources, 0.5, False)
    assert_same(outs[:1], outs[2:])
    assert_same(outs[1:2], outs[2:])
    kernels.square_sum_(sums[1], outs[2:], spans, 1.0)
    assert torch.equal(*sums)
    for out in outs:
        beside = out.as_strided((n + 64,), (1,), 0)
        assert bool((beside[:shift] == 7).all()) and bool((beside[shift + n :] == 7).all())


def test_reduce_is_nearer_to_the_exact_mean_than_one_rounding_a_rank(isa):
    """Averaging N bf16 sources: N fp32 roundings of 2^-24 each and one to bf16, 2^-8 (relative to the sum of magnitudes)."""
    sources = [torch.randn(4096, generator=torch.Generator().manual_seed(k)).bfloat16() for k in range(8)]
    out = torch.empty(4096, dtype=torch.bfloat16)
    kernels.reduce_(out, sources, 1 / 8, False)
    exact = sum(s.double() for s in sources) / 8
    size = sum(s.double().abs() for s in sources) / 8
    assert bool(((out.double() - exact).abs() <= exact.abs() * 2.0**-8 + 8 * 2.0**-24 * size).all())


@pytest.mark.parametrize("n", [0, 1, 5, 64, 1025, 200_003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_square_sum_is_exact_and_independent_of_the_cut(isa, n, dtype):
    src = wide(n, 8, 8.0 if dtype != torch.float16 else 1.0).to(dtype)
    whole, cut, slow = (torch.zeros(2, LIMBS, dtype=torch.int64) for _ in range(3))
    kernels.square_sum_(whole, [src], torch.tensor([[0, n, 0]]), 1.0)
    kernels.set_threads(2)
    middle = n * 2 // 3
    kernels.square_sum_(cut, [src], torch.tensor([[0, middle, 0], [middle, n, 0]]), 1.0)
    reference.square_sum_(slow, [src], torch.tensor([[0, n, 0]]), 1.0)
    assert torch.equal(whole, cut) and torch.equal(whole, slow) and not whole[1].any()
    exact = math.sqrt(math.fsum(x * x for x in src.double().tolist()))
    assert reference.square_root(whole[0].tolist()) == pytest.approx(exact, rel=1e-15)


@pytest.mark.parametrize("n", [7, 1025, 70_003])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_square_sum_of_an_average_over_any_range_of_exponents(isa, n, dtype, spread):
    sources = [wide(n, seed, spread).to(dtype) for seed in (1, 2, 3)]
    for source in sources:
        source[3::97] = 2.0 ** (-149 if dtype == torch.float32 else -24)  # subnormal, or near it
        source[5::89] = math.nan if n == 1025 else 65504.0 if dtype == torch.float16 else 1.9e19
    ours, theirs = (torch.full((2, LIMBS), 2**32 - 1, dtype=torch.int64) for _ in range(2))
    spans = torch.tensor([[0, n, 1], [1, n - 1, 0], [n // 2, n, 1]])
    kernels.square_sum_(ours, sources, spans, 1 / 3)
    reference.square_sum_(theirs, sources, spans, 1 / 3)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("binades", range(10, 48))
def test_square_sum_of_two_sizes_far_apart(isa, dtype, binades):
    """A block of the largest and of much smaller fractions: no accumulator rounds, wherever its last bit lies."""
    ones = 2.0 - torch.finfo(dtype).eps
    top = 15 if dtype == torch.float16 else 100
    src = torch.full((1024,), ones * 2.0**top, dtype=torch.float64)
    src[1::2] *= 2.0**-binades
    src[3::4] *= -1.0
    src = src.to(dtype)
    ours, theirs = (torch.zeros(1, LIMBS, dtype=torch.int64) for _ in range(2))
    for op, sums in ((kernels.square_sum_, ours), (reference.square_sum_, theirs)):
        op(sums, [src], torch.tensor([[0, 1024, 0]]), 1.0)
        op(sums, [src], torch.tensor([[1, 700, 0]]), 1.0)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("binades", range(12, 26))
def test_square_sum_of_blocks_that_follow_each_other(isa, dtype, binades):
    """The window of a block is that of the one before: what lies on its edges, above, below, nowhere near, and 0."""
    ones = 2.0 - torch.finfo(dtype).eps
    top = 10 if dtype == torch.float16 else 60
    src = torch.full((12, 1024), ones * 2.0**top, dtype=torch.float64)
    for block, up in enumerate([0, 0, 1, 2, 0, -3, 1, 0, 0, -12, -11, 3]):
        src[block] *= 2.0**up
    src[1:, 1::2] *= 2.0**-binades
    src[:, 7] *= -1.0
    src[7] = 0.0
    src = src.view(-1)[:-5].to(dtype)
    ours, theirs = (torch.zeros(1, LIMBS, dtype=torch.int64) for _ in range(2))
    for op, sums in ((kernels.square_sum_, ours), (reference.square_sum_, theirs)):
        op(sums, [src], torch.tensor([[0, len(src), 0]]), 1.0)
        op(sums, [src], torch.tensor([[3, 9_000, 0]]), 1.0)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("n", [1, 64, 1025, 200_003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_squares_is_both_in_one(isa, n, dtype):
    kernels.set_threads(2)
    sources = [shifted(wide(n, k, 3.0).to(dtype), k) for k in range(1, 4)]
    for spans in (
        [],
        [[0, n, 0]],
        [[0, n // 3, 1], [n // 3, n // 2, 0], [n // 2 + 1, n, 1]],
        [[k, k + 1, k % 2] for k in range(0, n, max(n // 50, 1))],
    ):
        table = torch.tensor(spans, dtype=torch.int64).view(-1, 3)
        outs = [torch.ones(n, dtype=dtype) for _ in range(2)]
        sums = [torch.full((2, LIMBS), 7, dtype=torch.int64) for _ in range(2)]
        kernels.reduce_squares_(outs[0], sums[0], sources, table, 1 / 3)
        kernels.reduce_(outs[1], sources, 1 / 3, False)
        kernels.square_sum_(sums[1], [outs[1]], table, 1.0)
        assert_same(outs[:1], outs[1:])
        assert torch.equal(sums[0], sums[1])


def test_square_sum_of_extremes(isa):
    src = torch.tensor([1e-45, -1e-45, 3.4e38, 3.4e38, 0.0])
    sums = torch.zeros(1, LIMBS, dtype=torch.int64)
    kernels.square_sum_(sums, [src], torch.tensor([[0, 2, 0]]), 1.0)
    assert reference.square_root(sums[0].tolist()) == pytest.approx(math.sqrt(2) * 2.0**-149, rel=1e-15)
    kernels.square_sum_(sums, [src], torch.tensor([[2, 5, 0]]), 1.0)
    assert reference.square_root(sums[0].tolist()) == pytest.approx(math.sqrt(2) * float(src[2]), rel=1e-15)
    kernels.square_sum_(sums, [torch.tensor([math.nan, math.inf, 1.0])], torch.tensor([[0, 3, 0]]), 1.0)
    assert sums[0, -1] == 2 and reference.square_root(sums[0].tolist()) == math.inf


def test_exact_sum_of_doubles():
    values = torch.tensor([1e300, 1.0, 5e-324, 1e-300, 0.1], dtype=torch.float64)
    parts = exact_sum(values[:2]) + exact_sum(values[2:])
    assert _value(parts.tolist()) == _value(exact_sum(values).tolist()) == math.fsum(values.tolist())
    assert _value(exact_sum(torch.tensor([math.inf], dtype=torch.float64)).tolist()) == math.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 63, 1024, 4999])
def test_exceeds(isa, dtype, bad, at):
    src = torch.randn(5000).to(dtype)
    flag = torch.zeros(1, dtype=torch.int64)
    kernels.exceeds_(flag, src, math.inf)
    kernels.exceeds_(flag, src, 100.0)
    assert flag.item() == 0
    kernels.exceeds_(flag, src, 0.5)
    assert flag.item() == 1
    src[at] = bad
    for op in (kernels.exceeds_, reference.exceeds_):
        flag.zero_()
        op(flag, src, math.inf)
        assert flag.item() == 1


@pytest.mark.parametrize("n", SIZES)
def test_pack(isa, n):
    kernels.set_threads(2)
    grads = [wide(k, k).bfloat16() for k in (n, 3, 0, 70_000)]
    offsets = [5, n + 10, n + 13, n + 20]
    flag = torch.zeros(1, dtype=torch.int64)
    for clear in (False, True):
        ours, theirs = (torch.ones(n + 70_100, dtype=torch.bfloat16) for _ in range(2))
        kernels.pack_(ours, grads[::-1], offsets[::-1], clear, flag, math.inf)
        reference.pack_(theirs, grads, offsets, clear, flag, math.inf)
        assert torch.equal(ours, theirs) and bool((ours[:5] == (not clear)).all()) and bool((ours[-10:] == (not clear)).all())
        nothing = torch.ones(70, dtype=torch.bfloat16)
        kernels.pack_(nothing, [], [], clear, flag, 0.0)
        assert bool((nothing == (not clear)).all()) and flag.item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start,width,stride", [(0, 7, 7), (0, 7, 70), (63, 7, 70), (33, 16, 70), (5, 17, 210), (0, 1, 1)])
def test_pack_keeps_a_window(isa, monkeypatch, dtype, start, width, stride):
    rows = 210 // stride
    grads = [wide(n, n, 1.0).to(dtype) for n in (100, 1, 0, 60)]
    offsets = [3, 103, 110, 140]
    whole = torch.zeros(rows * stride, dtype=dtype)
    for grad, offset in zip(grads, offsets, strict=True):
        whole[offset : offset + grad.numel()] = grad
    expected = whole.view(rows, stride)[:, start : start + width].reshape(-1)
    window = kernels.Window(start, width, stride)
    for by_address in (True, False):
        monkeypatch.setattr(ops, "_by_address", lambda answer=by_address: answer)
        out, flag = torch.ones_like(expected), torch.zeros(1, dtype=torch.int64)
        kernels.pack_(out, grads, offsets, True, flag, math.inf, window)
        assert torch.equal(out, expected) and flag.item() == 0
        kernels.pack_(out, grads, offsets, True, flag, float(expected.float().abs().max()), window)
        assert flag.item() == 1
        for grad, offset in zip(grads, offsets, strict=True):  # what is outside is not looked at
            inside = torch.tensor([start <= (offset + k) % stride < start + width for k in range(grad.numel())], dtype=bool)
            grad[~inside] = math.nan
        flag.zero_()
        kernels.pack_(out, grads, offsets, False, flag, math.inf, window)
        assert torch.equal(out, expected) and flag.item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", [0, 1])
@pytest.mark.parametrize("large", [False, True])
def test_pack_looks_at_every_element_once(isa, dtype, by, large):
    sizes = [3_000_000 if large else 70, 131, 1]  # large: stores past the caches
    offsets = [by, sizes[0] + by, sizes[0] + by + 131]
    out = torch.empty(sum(sizes) + 64, dtype=dtype)
    for value, limit, wanted in (
        (2.5, 2.5, 1),
        (-2.5, 2.5, 1),
        (2.5, 2.5009765625, 0),
        (math.nan, math.inf, 1),
        (-math.inf, math.inf, 1),
    ):
        for number, at in ((0, sizes[0] - 1), (1, 5)) if large else ((0, 0), (0, 69), (0, 35), (1, 5), (1, 130), (2, 0)):
            flag = torch.zeros(1, dtype=torch.int64)
            grads = [torch.full((size,), -0.5, dtype=dtype) for size in sizes]
            kernels.pack_(out, grads, offsets, True, flag, limit)
            assert flag.item() == 0
            grads[number][at] = value
            kernels.pack_(out, grads, offsets, True, flag, limit)
            assert flag.item() == wanted and torch.equal(out[by : by + sum(sizes)].isnan(), torch.cat(grads).isnan())
            assert torch.equal(out.nan_to_num()[by : by + sum(sizes)], torch.cat(grads).nan_to_num())
            assert not out[:by].any() and not out[by + sum(sizes) :].any()


def test_split_keeps_every_mantissa_and_every_exponent():
    low = torch.arange(1 << 16, dtype=torch.int32)
    for high in (0x0000, 0x0001, 0x3F80, 0x3F7F, 0x7F7F, 0x7F80, 0x7FC0, 0x7FFF, 0x8000, 0xBF80, 0xFF7F, 0xFFFF):
        master = ((torch.tensor(high, dtype=torch.int64) << 16) + low).to(torch.int64)
        master = torch.where(master >= 1 << 31, master - (1 << 32), master).to(torch.int32).view(torch.float32)
        param, rest = torch.empty(1 << 16, dtype=torch.bfloat16), torch.empty(1 << 16, dtype=torch.int16)
        reference.split_(param, rest, master)
        kept = bits(master) & 0x7FFFFFFF < 0x7FFF8000  # other NaNs would be zeros to the upper half
        assert torch.equal(bits(reference.join(param, rest))[kept], bits(master)[kept])
        assert bool(param[~kept].isnan().all())
    spread = wide(1 << 16, 1)
    param, rest = torch.empty(1 << 16, dtype=torch.bfloat16), torch.empty(1 << 16, dtype=torch.int16)
    reference.split_(param, rest, spread)
    assert bool(((param.float() - spread).abs() <= spread.abs() * 2.0**-8).all())  # the parameter is the nearest bf16


def op_samples():
    n = 130
    spans = torch.tensor([[0, 64, 0], [64, n, 1]])
    for dtype in DTYPES:
        sources = [wide(n, 1, 1.0).to(dtype), wide(n, 2, 1.0).to(dtype)]
        yield "reduce_adam_", (*adam_tensors(n, dtype), sources, spans, ROWS, 0.5)
        yield "reduce_", (torch.zeros(n, dtype=dtype), sources, 0.5, False)
        yield "square_sum_", (torch.zeros(2, LIMBS, dtype=torch.int64), sources, spans, 0.5)
        yield (
            "reduce_squares_",
            (
                torch.zeros(n, dtype=dtype),
                torch.zeros(2, LIMBS, dtype=torch.int64),
                sources,
                spans,
                0.5,
            ),
        )
        yield "exceeds_", (torch.zeros(1, dtype=torch.int64), sources[0], 1.0)
        yield "pack_", (torch.zeros(2 * n, dtype=dtype), sources, [0, n], True, torch.zeros(1, dtype=torch.int64), 1.0)


@pytest.mark.parametrize("name,args", [pytest.param(*s, id=f"{s[0]}{k}") for k, s in enumerate(op_samples())])
def test_opcheck(name, args):
    result = torch.library.opcheck(getattr(torch.ops.zerolite, name).default, args)
    assert set(result.values()) == {"SUCCESS"}


def test_bad_arguments_are_refused(isa):
    param, rest, m, v = adam_tensors(64, torch.float32)
    spans, flag = torch.tensor([[0, 64, 0]]), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="sources"):
        kernels.reduce_adam_(param, rest, m, v, [], spans, ROWS, 1.0)
    with pytest.raises(RuntimeError, match="64 elements, got 63"):
        kernels.reduce_adam_(param, rest, m[:63], v, [param.clone()], spans, ROWS, 1.0)
    with pytest.raises(RuntimeError, match="starts at 30, expected 40 or more"):
        sums = torch.zeros(1, LIMBS, dtype=torch.int64)
        kernels.reduce_squares_(m, sums, [v], torch.tensor([[0, 40, 0], [30, 64, 0]]), 1.0)
    with pytest.raises(RuntimeError, match="outside a tensor of 64"):
        kernels.reduce_adam_(param, rest, m, v, [param.clone()], torch.tensor([[0, 65, 0]]), ROWS, 1.0)
    with pytest.raises(RuntimeError, match="names index 2 of 2"):
        kernels.reduce_adam_(param, rest, m, v, [param.clone()], torch.tensor([[0, 6, 2]]), ROWS, 1.0)
    with pytest.raises(RuntimeError, match="int16"):
        kernels.reduce_adam_(param.bfloat16(), rest, m, v, [param.clone()], spans, ROWS, 1.0)
    with pytest.raises(RuntimeError, match="float32 to accumulate"):
        kernels.reduce_(param.bfloat16(), [param.clone()], 1.0, True)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        kernels.reduce_(param.double(), [param.clone()], 1.0, False)
    with pytest.raises(RuntimeError, match="ends outside"):
        kernels.pack_(param, [param.clone()], [1], True, flag, 1.0)
    with pytest.raises(RuntimeError, match="overlap at element 8"):
        kernels.pack_(param, [param[:10].clone(), param[:4].clone()], [0, 8], False, flag, 1.0)
    with pytest.raises(RuntimeError, match="window: expected 5 elements from 6 on within 10"):
        kernels.pack_(param[:10], [param.clone()], [0], True, flag, 1.0, kernels.Window(6, 5, 10))
    with pytest.raises(ValueError, match="instruction set 'sse'"):
        kernels.set_isa("sse")
    with pytest.raises(ValueError, match="at least 1"):
        kernels.set_threads(0)


def test_columns_of_a_row():
    assert ADAM_ROW == ("grad_scale", "l2", "decay", "mix1", "beta2", "mix2", "eps", "step_size") and ROWS.shape[1] == 8


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("isa", ISAS)
def test_environment_forces_an_instruction_set(isa):
    result = python("from zerolite import kernels; print(kernels.kernels_in_use())", ZEROLITE_ISA=isa)
    assert result.stdout.strip() == isa


def test_environment_forces_the_reference():
    result = python("from zerolite import kernels; print(kernels.kernels_in_use())", ZEROLITE_KERNELS="reference")
    assert result.stdout.strip() == "reference"


def test_environment_mistakes_are_named():
    assert "ZEROLITE_KERNELS: expected" in python("import zerolite", ZEROLITE_KERNELS="fast").stderr
    assert "instruction set 'mmx'" in python("import zerolite", ZEROLITE_ISA="mmx").stderr


def test_threads_follow_the_cores_of_the_ranks_here(monkeypatch):
    code = (
        "import torch, zerolite, os; from zerolite import kernels, host; p = torch.nn.Parameter(torch.ones(3));"
        "zerolite.ZeroOptimizer(torch.optim.AdamW([p])); print(kernels.threads(), host.usable_cores())"
    )
    found = python(code, OMP_NUM_THREADS="1", WORLD_SIZE="1").stdout.split()
    assert found[0] == found[1] and int(found[1]) >= 1
    assert python(code, ZEROLITE_THREADS="3", WORLD_SIZE="1").stdout.split()[0] == "3"
    assert python(code, LOCAL_WORLD_SIZE="1000", WORLD_SIZE="1").stdout.split()[0] == "1"  # others are in other groups
    assert "ZEROLITE_THREADS: expected a number" in python(code, ZEROLITE_THREADS="all").stderr


@pytest.mark.parametrize("text,cores", [("max 100000", 8), ("150000 100000", 2), ("800000 100000", 8), ("garbage", 8)])
def test_cores_follow_the_cgroup(tmp_path, monkeypatch, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(host, "_CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert host.usable_cores() == cores


@pytest.mark.parametrize(
    "mine,others,here,quota,expected",
    [
        (range(8), [range(8)] * 4, 4, "max 1", 2),
        (range(8), [range(8)], 4, "max 1", 2),  # three are in other groups
        (range(8), [range(8), range(8, 16)], 2, "max 1", 8),  # each is bound to cores of its own
        (range(8), [range(8), range(4, 12), range(12, 16)], 3, "max 1", 4),
        (range(8), [range(8), range(8, 16)], 2, "600000 100000", 3),  # a quota is of all
        (range(2), [range(2)] * 4, 4, "max 1", 1),
        (range(32), [range(32), range(32, 64)], 8, "max 1", 8),  # four of eight on each socket, in groups of two
    ],
)
def test_bound_ranks_do_not_divide_their_cores(tmp_path, monkeypatch, mine, others, here, quota, expected):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(host, "_CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(mine))
    assert host.core_share(here, [frozenset(cores) for cores in others]) == expected


def test_nested_groups_limit_too(tmp_path, monkeypatch):
    """A process without a cgroup namespace: its own groups are known by their paths alone."""
    lines = Path("/proc/self/cgroup")
    read = Path.read_text
    groups = "5:cpu,cpuacct:/job\n4:memory:/batch/job_1\n0::/slice/job"
    monkeypatch.setattr(Path, "read_text", lambda self, *a: groups if self == lines else read(self, *a))
    monkeypatch.setattr(host, "_CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    free, _ = host.usable_memory()
    for folder, files in {
        "slice": {
            "memory.max": "5000000",
            "memory.current": "4000000",
            "memory.stat": "inactive_file 500000",
            "cpu.max": "max 1",
        },
        "slice/job": {"memory.max": "max", "cpu.max": "1200000 100000"},
        "memory/batch/job_1": {
            "memory.limit_in_bytes": "3000000",
            "memory.usage_in_bytes": "2000000",
            "memory.stat": "inactive_file 1\ntotal_inactive_file 200000",  # of groups inside it too
        },
        "cpu/job": {"cpu.cfs_quota_us": "700000", "cpu.cfs_period_us": "100000"},
    }.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text + "\n")
    assert free > 5000000 and host.usable_memory() == (1200000, 3000000)
    assert host.usable_cores() == 7


def test_import_has_no_side_effects():
    code = (
        "import torch, time; t = time.perf_counter(); import zerolite; t = time.perf_counter() - t;"
        "import torch.distributed as d, threading, sys;"
        "print(d.is_initialized(), torch.cuda.is_initialized(), threading.active_count(),"
        "any(m.startswith(('transformers', 'matplotlib')) for m in sys.modules), t < 2)"
    )
    assert python(code).stdout.split() == ["False", "False", "1", "False", "True"]


def test_a_fork_after_the_threads_have_started():
    code = (
        "import os, torch; from zerolite import kernels; torch.set_num_threads(1); kernels.set_threads(2)\n"
        "n = 1 << 18; out = torch.zeros(n); src = [torch.ones(n)]; kernels.reduce_(out, src, 1.0, False)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n    kernels.reduce_(out, src, 1.0, True)\n"
        "    os._exit(7 if float(out.sum()) == 2 * n and len(os.listdir('/proc/self/task')) == 2 else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert python(code).stdout.strip() == "7"


@pytest.mark.parametrize("by_address", [True, False])
def test_pack_resolves_what_memory_has_with_the_other_sign(by_address, monkeypatch):
    monkeypatch.setattr(ops, "_by_address", lambda: by_address and kernels.kernels_in_use() != "reference")
    out, flag = torch.zeros(192), torch.zeros(1, dtype=torch.int64)
    weight = torch.nn.Parameter(torch.tensor([0.5]))
    (torch.complex(torch.ones(1), weight).conj() * torch.tensor([2.0 + 3.0j])).real.sum().backward()
    kernels.pack_(out, [torch.ones(3)._neg_view(), weight.grad], [0, 64], True, flag, 1e30)
    assert out[:3].tolist() == [-1.0] * 3 and out[64] == 3.0
    with pytest.raises(RuntimeError, match="offsets: expected 2, one for each gradient, got 1"):
        kernels.pack_(out, [torch.ones(3), torch.ones(3)], [0], True, flag, 1e30)


FLUSHED = """
import torch
from zerolite import kernels
kernels.set_threads(2)
source, spans = torch.full((1 << 18,), 3e-45), torch.tensor([[0, 1 << 18, 0]])
def results():
    sums = torch.zeros(1, kernels.LIMBS, dtype=torch.int64)
    kernels.square_sum_(sums, [source, source], spans, 0.5)
    average = torch.empty(1 << 18)
    kernels.reduce_(average, [source, source], 0.5, False)
    return sums, average
before = results()
assert bool(before[0].any()) and bool((before[1] == source).all())
assert torch.set_flush_denormal(True)
for _ in range(20):
    assert all(map(torch.equal, results(), before))
assert float(torch.tensor([3e-45]) * 1.0) == 0.0  # the program's own mode is as it was
"""


def test_subnormals_are_kept_where_the_program_flushes_them():
    if not ISAS or not torch.set_flush_denormal(False):
        pytest.skip("needs native kernels and a processor that can flush")
    done = subprocess.run([sys.executable, "-c", FLUSHED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_packing_refuses_gradients_that_are_elsewhere():
    """Where a gradient has no memory, its address is 0, which means that nothing is there."""
    with pytest.raises(RuntimeError, match="grads: expected contiguous tensors of the dtype and device of out"):
        kernels.pack_(torch.zeros(64), [torch.ones(8, device="meta")], [0], False, torch.zeros(1, dtype=torch.int64), 1e30)


def test_squares_are_of_what_is_written():
    out, sums = torch.zeros(8, dtype=torch.bfloat16), torch.zeros(1, kernels.LIMBS, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"out: expected torch\.float32, the dtype of the sources, got torch\.bfloat16"):
        kernels.reduce_squares_(out, sums, [torch.ones(8)], torch.tensor([[0, 8, 0]]), 1.0)


def test_the_op_of_packing_refuses_what_is_not_one_block_of_memory():
    if not ISAS:
        pytest.skip("needs native kernels")
    out, flag = torch.zeros(64), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="grads: expected contiguous tensors of the dtype of out"):
        torch.ops.zerolite.pack_(out, [torch.ones(1).expand(64)], [0], True, flag, 1e30)
    with pytest.raises(RuntimeError, match="grads: item 0 ends outside out"):
        torch.ops.zerolite.pack_(out, [torch.ones(8)], [2**63 - 1], True, flag, 1e30)
    places = torch.tensor([[2**63 - 1], [8], [out.data_ptr()]])
    with pytest.raises(RuntimeError, match="grads: item 0 ends outside out"):
        torch.ops.zerolite.pack_at_(out, places, True, flag, 1e30, 0, 64, 64)
