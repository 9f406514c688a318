"""The CUDA kernels of stored moments without a GPU, over simulated blocks (see test_cuda_lanes): same bits as on the CPU.

A warp's exchange of maxima is simulated step by step over all threads of a block. That a device's lanes meet there is not
tested.
"""

from __future__ import annotations

import ctypes
import math
import shutil

import pytest
import torch
from test_cuda_lanes import CODE, ROOT, Emulator, OutOfBounds, mistaken, placed, pointers
from test_kernels import DTYPES, NANS, assert_same, float_of, wide
from test_moments import KINDS, coded, kinds, rows_of
from torch import Tensor

from zerolite import kernels

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

# Around a group, a block's tile (1024 or 2048), and two.
SIZES = [0, 1, 7, 63, 64, 65, 127, 1000, 1023, 1025, 2047, 2049, 4097]


class Moments(Emulator):
    half = "MOMENTS"

    def reduce_adam_moments_(self, param, rest, m, v, scales, sources, spans, rows, mean):
        head = [ctypes.c_void_p(t.data_ptr()) for t in (param, rest, m, v, scales)]
        listed, count, dtype = pointers(sources), len(sources), CODE[sources[0].dtype]
        tail = [ctypes.c_float(mean), ctypes.c_void_p(spans.data_ptr()), ctypes.c_int64(len(spans))]
        tail.append(ctypes.c_void_p(rows.data_ptr()))
        tensors = [param, rest, m, v, scales, *sources]
        self.call("moments", tensors, *head, CODE[param.dtype], int(m.dtype == torch.uint8), listed, count, dtype, *tail)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return Moments(ROOT / "csrc", tmp_path_factory.mktemp("emulate"), optimised=True)


def lively(n: int, kind: str, dtype: torch.dtype) -> list[Tensor]:
    """Tensors after an update on the CPU, so that moments and scales are those of many magnitudes; what no span covers, too."""
    tensors = coded(n, kind, dtype)
    whole = torch.tensor([[0, n, 0]])
    kernels.reduce_adam_moments_(*tensors, [wide(n, 5, 3.0).clamp(-6e4, 6e4)], whole, rows_of(1), 1.0)
    return tensors


def check(ops: Moments, n, kind, dtype, source_dtype, count, spans, shifts=(0, 0)) -> None:
    """Two updates of everything that the op may write, with the CPU kernels beside."""
    theirs = lively(n, kind, dtype)
    ours = [placed(t.clone().view(-1), shifts[0]) for t in theirs]
    for step in range(2):
        sources = [(wide(n, 10 * step + k, 3.0) * 10.0**-step).clamp(-6e4, 6e4).to(source_dtype) for k in range(count)]
        rows = rows_of(step + 2, step + 9)
        there = [placed(s, shifts[1] * (k % 2)) for k, s in enumerate(sources)]
        ops.reduce_adam_moments_(*ours, there, spans, rows, 1 / count)
        kernels.reduce_adam_moments_(*theirs, sources, spans, rows, 1 / count)
        assert_same(ours, [t.view(-1) for t in theirs])


def short_groups(n: int) -> Tensor:
    """Spans that end inside of groups, an empty one, and a gap."""
    cut = n // 3 // 64 * 64
    return torch.tensor([[0, max(cut - 5, 0), 0], [cut, cut, 0], [cut + 64 if cut + 64 < n else cut, n, 1]])


@kinds
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source_dtype", DTYPES)
def test_update(emulated, n, kind, dtype, source_dtype):
    check(emulated, n, kind, dtype, source_dtype, 1 + n % 3, short_groups(n))


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shifts", [(1, 0), (4, 0), (0, 1), (3, 3)], ids=str)
def test_tensors_that_do_not_line_up(emulated, kind, dtype, shifts):
    check(emulated, 1000, kind, dtype, dtype, 2, short_groups(1000), shifts)


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 64, 65])  # 65: the pointers no longer fit the kernel's arguments
def test_many_sources(emulated, kind, dtype, count):
    check(emulated, 131, kind, dtype, dtype, count, torch.tensor([[0, 64, 1], [64, 131, 0]]))


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_spans(emulated, kind, dtype):
    """More than a launch holds, of 0 to 192 elements, in no order."""
    spans = torch.tensor([[192 * k, 192 * k + 37 * k % 193, k % 2] for k in range(120)])
    check(emulated, 192 * 120, kind, dtype, dtype, 2, spans[torch.randperm(120, generator=torch.Generator().manual_seed(1))])


@kinds
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-38, 1e-20, 1e15])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(emulated, kind, value, dtype):
    """Groups of one value, and groups with one such element beside ordinary ones."""
    grad = torch.full((200,), value)
    grad[64:128] = 0.01
    grad[70] = value
    theirs = coded(200, kind, dtype)
    ours = [t.clone() for t in theirs]
    for op, tensors in ((emulated.reduce_adam_moments_, ours), (kernels.reduce_adam_moments_, theirs)):
        op(*tensors, [grad], torch.tensor([[0, 200, 0]]), rows_of(3), 1.0)
    assert_same(ours, theirs)


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [0x7F800000, *NANS])  # infinity first
def test_moments_of_a_nan_and_its_neighbours_are_those_of_the_cpu(emulated, kind, dtype, bits):
    """A GPU's NaN, 0x7fffffff, would raise the scale of its group and round to a moment of -0."""
    grad = wide(200, 4, 1.0)
    theirs = lively(200, kind, dtype)
    ours = [t.clone() for t in theirs]
    grad[77] = float_of(bits)
    for op, tensors in ((emulated.reduce_adam_moments_, ours), (kernels.reduce_adam_moments_, theirs)):
        op(*tensors, [grad], torch.tensor([[0, 200, 0]]), rows_of(3), 1.0)
    assert_same(ours, theirs)
    assert bool(ours[0][77].isnan())
    if kind == "bf16":
        assert bool(ours[2][77].isnan()) == math.isnan(float(grad[77])) and float(ours[3][77]) == 2.0**126


def battery(ops: Moments) -> None:
    """A few of the tests above, small."""
    for kind in KINDS:
        for dtype in (torch.bfloat16, torch.float32):
            for n in (65, 2100):
                check(ops, n, kind, dtype, dtype, 2, short_groups(n))
            check(ops, 200, kind, dtype, dtype, 1, torch.tensor([[0, 200, 0]]), (1, 0))
    check(
        ops, 192 * 60, "int8", torch.bfloat16, torch.bfloat16, 1, torch.tensor([[192 * k, 192 * k + 100, 0] for k in range(60)])
    )
    for dtype in DTYPES:
        test_moments_of_a_nan_and_its_neighbours_are_those_of_the_cpu(ops, "int8", dtype, 0x7FFFFFFF)


MISTAKES: dict[str, tuple[str, str, str]] = {
    "a maximum over half a group": ("moments.h", "by = kLanes / 2", "by = kLanes / 4"),
    "a maximum over two groups": ("moments.h", "by = kLanes / 2", "by = kLanes"),
    "a step of the maximum left out": ("moments.h", "by > 0; by /= 2", "by > 1; by /= 2"),
    "the scales of another group": (
        "moments.h",
        "task.t.scales + lane.at.at / kGroup * 2",
        "task.t.scales + lane.at.at / kGroup",
    ),
    "scales read for one element too many": ("moments.h", "lane.at.hi > 0)", "lane.at.hi >= 0)"),
    "scales written by lanes without elements": ("moments.h", "at.at % kGroup == 0 && at.hi > 0", "at.at % 8 == 0"),
    "a vector across the end": ("moments.h", "lane.at.hi == lane.W", "lane.at.hi > 0"),
    "misaligned vectors": ("tables.h", "phase == 0 ? 0 : kScattered", "phase == 0 ? 0 : 0"),
    "tiles of another width": (
        "tables.h",
        "count, width, kThreads * width, entry",
        "count, width, kThreads * width * 2, entry",
    ),
    "the wrong span": ("tables.h", "e.first = tiles;", "e.first = 0;"),
    "the wrong row": ("tables.h", "spans[3 * i + 2] * kMomentRow", "spans[3 * i + 2] * kAdamRow"),
    "stale registers": ("moments.h", "lane.scales[0] = lane.scales[1] = 0;", ""),
    "a maximum kept from before": ("moments.h", "lane.tops = {0, 0};", ""),
    "a GPU's NaN in the maximum": ("moments.h", "lane.m[i] = plain(lane.m[i]);", ""),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake, tmp_path):
    """The tests above would notice: each of these mistakes breaks some of them."""
    broken = Moments(mistaken(tmp_path, *MISTAKES[mistake]), tmp_path)
    with pytest.raises((OutOfBounds, AssertionError)):
        battery(broken)
