"""The CUDA kernels' indexing and arithmetic without a GPU: their own headers over simulated blocks (tests/emulate.cpp).

Blocks and threads run one after another on the CPU and each access is checked, so this finds wrong indices, misaligned vectors,
wrong spans and lost carries. It cannot find races, missing barriers, or a device that rounds otherwise.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_kernels import DTYPES, ROWS, adam_tensors, assert_same, float_of, wide
from torch import Tensor

from zerolite import kernels
from zerolite.kernels.ops import LIMBS

ROOT = Path(__file__).parent.parent
GUARD = 64  # elements around each tensor that no kernel may touch
CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class OutOfBounds(Exception):
    """A simulated thread touched memory outside the tensors of the call, or misaligned."""


class Emulator:
    """The ops of `zerolite.kernels` on the compiled tests/emulate.cpp."""

    half = "LANES"  # of tests/emulate.cpp

    def __init__(self, csrc: Path, out: Path, optimised: bool = False):
        """optimised: what is compiled for many calls"""
        flags = ["-O1" if optimised else "-O0", f"-DONLY_{self.half}", "-Wno-unused-function", "-std=c++20"]
        flags += ["-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-Wall", "-Werror"]
        target = out / "emulate.so"
        command = ["g++", *flags, f"-I{csrc}", str(ROOT / "tests" / "emulate.cpp"), "-o", str(target)]
        subprocess.run(command, check=True, timeout=100)
        self.library = ctypes.CDLL(str(target))

    def call(self, name: str, tensors: list[Tensor], *args) -> None:
        self.library.forget()
        for t in tensors:
            self.library.allow(ctypes.c_void_p(t.data_ptr()), ctypes.c_int64(t.numel() * t.element_size()))
        if getattr(self.library, name)(*args):
            raise OutOfBounds(name)

    def reduce_adam_(self, param, rest, m, v, sources, spans, rows, mean):
        listed, count, dtype = pointers(sources), len(sources), CODE[sources[0].dtype]
        head = [ctypes.c_void_p(t.data_ptr()) for t in (param, rest, m, v)]
        tail = [ctypes.c_float(mean), ctypes.c_void_p(spans.data_ptr()), ctypes.c_int64(len(spans))]
        tensors = [param, rest, m, v, *sources]
        self.call("adam", tensors, *head, CODE[param.dtype], listed, count, dtype, *tail, ctypes.c_void_p(rows.data_ptr()))

    def reduce_(self, out, sources, mean, accumulate):
        listed, count, dtype = pointers(sources), len(sources), CODE[sources[0].dtype]
        head = [ctypes.c_void_p(out.data_ptr()), CODE[out.dtype], int(accumulate), listed, count, dtype]
        self.call("reduce", [out, *sources], *head, ctypes.c_float(mean), ctypes.c_int64(out.numel()))

    def square_sum_(self, sums, src, spans):
        args = [ctypes.c_void_p(sums.data_ptr()), ctypes.c_void_p(src.data_ptr()), CODE[src.dtype]]
        self.call("square_sum", [sums, src], *args, ctypes.c_void_p(spans.data_ptr()), ctypes.c_int64(len(spans)))

    def exceeds_(self, flag, src, limit):
        args = [ctypes.c_void_p(flag.data_ptr()), ctypes.c_void_p(src.data_ptr()), CODE[src.dtype]]
        self.call("exceeds", [flag, src], *args, ctypes.c_int64(src.numel()), ctypes.c_float(limit))

    def pack_(self, out, grads, offsets, clear, flag, limit):
        parts = [(start, start + g.numel(), g.data_ptr()) for start, g in zip(offsets, grads, strict=True)]
        ends = [0, *(stop for _, stop, _ in parts)]
        if clear:
            parts += [(a, b, None) for a, (b, _, _) in zip(ends, [*parts, (out.numel(), 0, 0)], strict=True) if a < b]
        starts, stops = ((ctypes.c_int64 * len(parts))(*[part[k] for part in parts]) for k in (0, 1))
        sources = (ctypes.c_void_p * len(parts))(*[part[2] for part in parts])
        args = [ctypes.c_void_p(out.data_ptr()), CODE[out.dtype], sources, starts, stops, ctypes.c_int64(len(parts))]
        self.call("pack", [out, *grads, flag], *args, ctypes.c_void_p(flag.data_ptr()), ctypes.c_float(limit))


def pointers(tensors):
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def placed(t: Tensor, by: int) -> Tensor:
    """The same values `by` elements after an address that is a multiple of 64 bytes, with a guard on both sides."""
    room = torch.zeros(t.numel() + 2 * GUARD + by, dtype=t.dtype)
    assert room.data_ptr() % 64 == 0
    room[GUARD + by : GUARD + by + t.numel()] = t
    return room[GUARD + by : GUARD + by + t.numel()]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return Emulator(ROOT / "csrc", tmp_path_factory.mktemp("emulate"), optimised=True)


# Element counts around a vector (4, 8), a block's tile (2048) and a chunk of squares (65536).
SIZES = [0, 1, 3, 4, 5, 7, 8, 9, 63, 64, 2047, 2048, 2049, 4099, 65537]


def check_adam(ops, n, dtype, source_dtype, count, shifts, spans):
    sources = [wide(n, 10 + k, 2.0).to(source_dtype) for k in range(count)]
    ours = [placed(t, shifts[0]) if t.numel() else t for t in adam_tensors(n, dtype)]
    theirs = adam_tensors(n, dtype)
    ops.reduce_adam_(*ours, [placed(s, shifts[1 + k % 2]) for k, s in enumerate(sources)], spans, ROWS, 1 / count)
    kernels.reduce_adam_(*theirs, sources, spans, ROWS, 1 / count)
    assert_same(ours, theirs)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shifts", [(0, 0, 0), (1, 1, 1), (3, 3, 3), (0, 1, 0)], ids=str)
def test_adam(emulated, n, dtype, shifts):
    cut = n // 3
    spans = torch.tensor([[0, cut, 0], [cut, cut, 1], [min(cut + 1, n), n, 1]])
    check_adam(emulated, n, dtype, dtype, 1 + n % 3, shifts, spans)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source_dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 8, 65])  # 65: the pointers no longer fit the kernel's arguments
def test_adam_of_many_sources(emulated, dtype, source_dtype, count):
    check_adam(emulated, 131, dtype, source_dtype, count, (0, 0, 0), torch.tensor([[2, 130, 1]]))


def many_spans(n, rows):
    """More spans than a launch holds, of 0 to 36 elements, with gaps."""
    starts = range(0, n - 40, 41)
    return torch.tensor([[at + k % 5, at + k % 5 + k % 37, k % rows] for k, at in enumerate(starts)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_of_many_spans(emulated, dtype):
    check_adam(emulated, 9000, dtype, dtype, 2, (0, 0, 0), many_spans(9000, 2))


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-38, 3e38, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_of_special_values(emulated, value, dtype):
    sources = [torch.full((70,), value).to(dtype), torch.full((70,), 1.0).to(dtype)]
    ours, theirs = adam_tensors(70, dtype), adam_tensors(70, dtype)
    for op, tensors in ((emulated.reduce_adam_, ours), (kernels.reduce_adam_, theirs)):
        op(*tensors, sources, torch.tensor([[0, 70, 0]]), ROWS, 0.5)
    assert_same(ours, theirs)


def test_a_nan_of_a_gpu_shows_in_a_bfloat16_parameter(emulated):
    """0x7fffffff, the NaN that a GPU computes, would round to a bf16 zero."""
    param, rest, m, v = adam_tensors(8, torch.bfloat16)
    emulated.reduce_adam_(param, rest, m, v, [float_of(0x7FFFFFFF).repeat(8)], torch.tensor([[0, 8, 0]]), ROWS, 1.0)
    assert bool(param.isnan().all())


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", [*DTYPES, "accumulate"], ids=str)
@pytest.mark.parametrize("shifts", [(0, 0), (3, 3), (0, 2)], ids=str)
def test_reduce(emulated, n, dtype, out, shifts):
    sources = [wide(n, k).to(dtype) for k in range(1, 2 + n % 3)]
    adds = out == "accumulate"
    ours, theirs = (placed(torch.ones(n, dtype=torch.float32 if adds else out), shifts[0]) for _ in range(2))
    emulated.reduce_(ours, [placed(s, shifts[1]) for s in sources], 1 / 3, adds)
    kernels.reduce_(theirs, sources, 1 / 3, adds)
    assert_same([ours], [theirs])


def check_squares(ops, src, spans, rows, by=0):
    ours, theirs = (torch.ones(rows, LIMBS, dtype=torch.int64) for _ in range(2))
    ops.square_sum_(ours, placed(src, by), spans)
    kernels.square_sum_(theirs, [src], spans, 1.0)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("n", [*SIZES, 200_003])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.5, 8.0, 24.0])  # within a thread's window; partly outside; nearly every exponent
def test_square_sum(emulated, n, dtype, scale):
    src = wide(n, 8, scale if dtype != torch.float16 else min(scale, 1.0)).to(dtype)
    src[n // 7 :: 1001] = math.nan
    src[n // 5 :: 1003] = 1e-45
    src[:: max(n // 3, 1)] = 0.0
    cut = n // 3
    spans = torch.tensor([[0, cut, 1], [cut, cut, 2], [min(cut + 1, n), n, 1], [n // 2, n, 0]])
    check_squares(emulated, src, spans, 3, n % 5)


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).max, 1e-45, 1.17549435e-38, 1.0, -0.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_square_sum_of_one_value(emulated, value, dtype):
    """2^17 equal squares: the most that a window and a bin hold, the highest and the lowest limb."""
    check_squares(emulated, torch.full((1 << 17,), value).to(dtype), torch.tensor([[0, 1 << 17, 0]]), 1)


def test_square_sum_outside_the_window(emulated):
    """All of a chunk in one bin: each thread's window begins with its first value, and the rest lies far above."""
    src = torch.full((1 << 16,), torch.finfo(torch.float32).max)
    src[: 256 * 4] = 1e-30
    check_squares(emulated, src, torch.tensor([[0, 1 << 16, 0]]), 1)


def test_square_sum_at_both_ends_of_the_window(emulated):
    """A first value 24 to 54 bits above its limb, then 252 squares of 48 ones, 24 bits higher: 72 bits is the last to fit."""
    src = torch.full((1 << 16,), 2.0**13 - 2.0**-11)
    src[: 256 * 4] = 1.0
    for up in range(-8, 8):
        check_squares(emulated, src * 2.0**up, torch.tensor([[0, 1 << 16, 0]]), 1)


def test_square_sum_of_many_spans(emulated):
    check_squares(emulated, wide(20_000, 3, 8.0), many_spans(20_000, 7), 9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 3, 2047, 4098])
@pytest.mark.parametrize("by", [0, 1])
def test_exceeds(emulated, dtype, at, by):
    for value, limit in ((100.0, 100.0), (math.nan, math.inf), (-math.inf, math.inf), (0.0, 0.0)):
        src = torch.full((4099,), 0.5).to(dtype)
        flag = torch.zeros(1, dtype=torch.int64)
        emulated.exceeds_(flag, placed(src, by), 0.51)
        assert flag.item() == 0
        src[at] = value
        emulated.exceeds_(flag, placed(src, by), limit)
        assert flag.item() == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", [0, 1])
def test_pack(emulated, dtype, by):
    sizes = [*SIZES[:-1], 3, 70, *[k % 9 for k in range(130)]]  # more than a launch holds
    grads = [placed(torch.arange(n).to(dtype), by * (k % 2)) for k, n in enumerate(sizes)]
    offsets = [sum(-(-n // 64) * 64 for n in sizes[:k]) + by for k in range(len(sizes))]
    largest = max(float(grad.max()) for grad in grads if grad.numel())
    for clear, limit in ((False, largest), (True, largest * 1.01), (True, 0.5)):
        ours, theirs = (placed(torch.ones(offsets[-1] + 100, dtype=dtype), 0) for _ in range(2))
        flags = torch.zeros(2, 1, dtype=torch.int64)
        emulated.pack_(ours, grads, offsets, clear, flags[0], limit)
        kernels.pack_(theirs, grads, offsets, clear, flags[1], limit)
        assert torch.equal(ours, theirs) and bool((ours[-1] == (not clear)).all())
        assert flags.tolist() == [[int(largest >= limit)]] * 2


def battery(ops: Emulator) -> None:
    """A few of the tests above, small."""
    for n in (5, 2049):
        for shifts in ((0, 0, 0), (0, 1, 0)):
            check_adam(ops, n, torch.bfloat16, torch.bfloat16, 2, shifts, torch.tensor([[0, n // 3, 0], [n // 3, n, 1]]))
    test_square_sum_at_both_ends_of_the_window(ops)
    test_pack(ops, torch.bfloat16, 1)


MISTAKES: dict[str, tuple[str, str, str]] = {
    "one past the end": ("lanes.h", "left > W ? W", "left > W - 2 ? W"),
    "overlapping blocks": ("lanes.h", "* U + u) * kThreads", "* U + u) * (kThreads - 1)"),
    "misaligned vectors": ("tables.h", "phase == found ? found : kScattered", "phase == found ? found : found"),
    "the wrong span": ("tables.h", "e.first = tiles;", "e.first = 0;"),
    "an overflowing window": ("square.h", "by > kWindowShift", "by > kWindowShift + 8"),
    "a lost carry": ("square.h", "w.high += high + (w.low < low)", "w.high += high"),
}


def mistaken(tmp_path: Path, name: str, right: str, wrong: str) -> Path:
    """A copy of csrc/ with one mistake in a file of csrc/cuda."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc" / "cuda" / name
    assert path.read_text().count(right) == 1
    path.write_text(path.read_text().replace(right, wrong))
    return tmp_path / "csrc"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake, tmp_path):
    """The tests above would notice: each of these mistakes breaks some of them."""
    broken = Emulator(mistaken(tmp_path, *MISTAKES[mistake]), tmp_path)
    with pytest.raises((OutOfBounds, AssertionError)):
        battery(broken)
