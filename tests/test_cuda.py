"""CUDA kernels: what the compiled library holds (needs nvcc), and every op against the reference on the CPU (needs a GPU)."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_kernels import DTYPES, ROWS, adam_tensors, assert_same, wide
from test_moments import coded, kinds, rows_of

from zerolite import kernels
from zerolite.kernels import native, reference
from zerolite.kernels.ops import LIMBS

ROOT = Path(__file__).parent.parent
OPS = ("reduce_adam_", "reduce_adam_moments_", "reduce_", "square_sum_", "exceeds_", "pack_")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZES = [0, 1, 3, 5, 7, 8, 9, 63, 64, 65, 2047, 2048, 2049, 65537]


def fat_binaries(data: bytes) -> list[tuple[str, int]]:
    """(kind, architecture) of each image in a library: 'elf' is machine code, 'ptx' is compiled by the driver."""
    found, at = [], data.find(b"\x50\xed\x55\xba")
    while at >= 0:
        version, header, size = struct.unpack_from("<HHQ", data, at + 4)
        entry, end = at + header, at + header + size
        while version == 1 and header == 16 and entry < end:
            kind, _, skip, length = struct.unpack_from("<HHIQ", data, entry)
            found.append(({1: "ptx", 2: "elf"}[kind], struct.unpack_from("<I", data, entry + 28)[0]))
            entry += skip + length
        at = data.find(b"\x50\xed\x55\xba", at + 16)
    return found


@needs_nvcc
def test_the_library_holds_every_architecture():
    assert native.CUDA_LIBRARY.exists(), "make cuda says why it was not built"
    images = fat_binaries(native.CUDA_LIBRARY.read_bytes())
    assert {arch for kind, arch in images if kind == "elf"} == {80, 90, 100}
    assert {arch for kind, arch in images if kind == "ptx"} == {100}


@needs_nvcc
def test_the_library_registers_the_ops_and_loads_without_a_device():
    code = (
        "import torch; from zerolite.kernels import native;"
        "native._load_cuda() or torch.ops.load_library(str(native.CUDA_LIBRARY));"
        f"has = torch._C._dispatch_has_kernel_for_dispatch_key; print([has('zerolite::' + n, 'CUDA') for n in {OPS}],"
        "torch.cuda.is_initialized())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert result.stdout.strip() == f"{[True] * len(OPS)} False", result.stderr


@needs_nvcc
def test_each_operation_is_rounded_by_itself(tmp_path):
    """Without .rn the assembler may fuse a multiplication and an addition; approximate and flushed forms change bits."""
    spec = importlib.util.spec_from_file_location("zerolite_setup", ROOT / "setup.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    target = tmp_path / "kernels.ptx"
    source = build.CSRC / "cuda" / "kernels.cu"
    command = [build.find_nvcc(), *build.CUDA_FLAGS, "-arch=compute_90", "-ptx", str(source), "-o", str(target)]
    subprocess.run(command, check=True, timeout=100)
    arithmetic = set(re.findall(r"\b(?:add|sub|mul|fma|mad|div|sqrt|rcp|rsqrt)\.[a-z0-9.]*f(?:16|32|64)\b", target.read_text()))
    assert arithmetic == {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32"}


def on_gpu(t: torch.Tensor, by: int = 0) -> torch.Tensor:
    """The same values on the GPU, `by` elements after an aligned address."""
    room = torch.zeros(t.numel() + by, dtype=t.dtype, device="cuda")
    room[by:] = t.to("cuda")
    return room[by:]


def adam_on_both(n, dtype, sources, spans, shifts=(0, 0), mean=1.0):
    ours = [on_gpu(t, shifts[0]) if t.numel() else t.cuda() for t in adam_tensors(n, dtype)]
    theirs = adam_tensors(n, dtype)
    kernels.reduce_adam_(*ours, [on_gpu(s, shifts[k % 2]) for k, s in enumerate(sources)], spans, ROWS, mean)
    reference.reduce_adam_(*theirs, sources, spans, ROWS, mean)
    assert_same([t.cpu() for t in ours], theirs)


@needs_gpu
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shifts", [(0, 0), (1, 1), (0, 3)], ids=str)
def test_adam(n, dtype, shifts):
    cut, count = n // 3, 1 + n % 8
    spans = torch.tensor([[0, cut, 0], [cut, cut, 1], [min(cut + 1, n), n, 1]])
    adam_on_both(n, dtype, [wide(n, 10 + k, 2.0).to(dtype) for k in range(count)], spans, shifts, 1 / count)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source_dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 8, 64, 65, 200])
def test_adam_of_many_sources(dtype, source_dtype, count):
    sources = [wide(1000, k, 2.0).to(source_dtype) for k in range(count)]
    adam_on_both(1000, dtype, sources, torch.tensor([[3, 997, 1]]), mean=1 / count)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_of_many_spans_on_either_device(dtype):
    spans = torch.tensor([[k * 41 + k % 5, k * 41 + k % 5 + k % 37, k % 2] for k in range(400)])
    sources = [wide(17_000, k, 2.0).to(dtype) for k in range(2)]
    adam_on_both(17_000, dtype, sources, spans)
    ours, theirs = [[on_gpu(t) for t in adam_tensors(17_000, dtype)] for _ in range(2)]
    there = [s.cuda() for s in sources]
    kernels.reduce_adam_(*ours, there, spans, ROWS, 0.5)
    kernels.reduce_adam_(*theirs, there, spans.cuda(), ROWS.cuda(), 0.5)
    assert_same([t.cpu() for t in ours], [t.cpu() for t in theirs])


@needs_gpu
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-40, 1e-38, 3e38, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_of_special_values(value, dtype):
    sources = [torch.full((70,), value).to(dtype), torch.full((70,), 1.0).to(dtype)]
    adam_on_both(70, dtype, sources, torch.tensor([[0, 70, 0]]), mean=0.5)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_over_all_magnitudes(dtype):
    """Division and square root rounded as on the host, subnormals included."""
    n = 1 << 22
    bits = torch.randint(-(2**31), 2**31 - 1, (n,), dtype=torch.int32, generator=torch.Generator().manual_seed(5))
    values = torch.where(bits.view(torch.float32).isfinite(), bits.view(torch.float32), 0.0)
    adam_on_both(n, dtype, [values], torch.tensor([[0, n, 0]]))


def moments_on_both(n, kind, dtype, source_dtype, count, spans, shifts=(0, 0), scale=1.0):
    """Three updates from nothing."""
    theirs = coded(n, kind, dtype)
    ours = [on_gpu(t.view(-1), shifts[0]) if t.numel() else t.view(-1).cuda() for t in theirs]
    for step in range(3):
        sources = [(wide(n, 10 * step + k, 3.0) * scale * 10.0**-step).clamp(-6e4, 6e4).to(source_dtype) for k in range(count)]
        rows = rows_of(step + 1, step + 9)
        there = [on_gpu(s, shifts[1] * (k % 2)) for k, s in enumerate(sources)]
        kernels.reduce_adam_moments_(*ours, there, spans, rows, 1 / count)
        reference.reduce_adam_moments_(*theirs, sources, spans, rows, 1 / count)
        assert_same([t.cpu() for t in ours], [t.view(-1) for t in theirs])


@needs_gpu
@kinds
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 127, 1000, 1025, 2049, 4097, 1_000_003])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source_dtype", DTYPES)
@pytest.mark.parametrize("shifts", [(0, 0), (1, 0), (0, 3)], ids=str)
def test_moments(n, kind, dtype, source_dtype, shifts):
    cut = n // 3 // 64 * 64
    spans = torch.tensor([[0, max(cut - 5, 0), 0], [cut, cut, 1], [cut, n, 1]])
    moments_on_both(n, kind, dtype, source_dtype, 1 + n % 3, spans, shifts)


@needs_gpu
@kinds
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count,scale", [(1, 0.0), (1, 1e-30), (2, 1e-10), (64, 1.0), (65, 1.0)])
def test_moments_of_many_spans_and_sources(kind, dtype, count, scale):
    spans = torch.tensor([[192 * k, 192 * k + 37 * k % 193, k % 2] for k in range(120)])
    moments_on_both(192 * 120, kind, dtype, torch.float32, count, spans, scale=scale)


@needs_gpu
@kinds
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_neighbours_of_a_nan_are_those_of_the_cpu(kind, dtype, value):
    grad, theirs = wide(200, 4, 1.0), coded(200, kind, dtype)
    ours = [t.cuda() for t in theirs]
    grad[77] = value
    kernels.reduce_adam_moments_(*ours, [grad.cuda()], torch.tensor([[0, 200, 0]]), rows_of(3), 1.0)
    reference.reduce_adam_moments_(*theirs, [grad], torch.tensor([[0, 200, 0]]), rows_of(3), 1.0)
    others = torch.arange(200) != 77
    for a, b in zip(ours[:4], theirs[:4], strict=True):
        if b.numel():
            assert_same([a.cpu()[others]], [b[others]])
    assert_same([ours[4].cpu()], theirs[4:])
    assert bool(ours[0][77].isnan())


@needs_gpu
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", [*DTYPES, "accumulate"], ids=str)
@pytest.mark.parametrize("shifts", [(0, 0), (3, 3), (0, 2)], ids=str)
def test_reduce(n, dtype, out, shifts):
    sources = [wide(n, k).to(dtype) for k in range(1, 2 + n % 8)]
    adds = out == "accumulate"
    theirs = torch.ones(n, dtype=torch.float32 if adds else out)
    ours = on_gpu(theirs, shifts[0])
    kernels.reduce_(ours, [on_gpu(s, shifts[1]) for s in sources], 1 / 3, adds)
    reference.reduce_(theirs, sources, 1 / 3, adds)
    assert_same([ours.cpu()], [theirs])


@needs_gpu
@pytest.mark.parametrize("n", [*SIZES, 200_003, 3_000_000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.5, 8.0, 24.0])
def test_square_sum(n, dtype, scale):
    src = wide(n, 8, scale if dtype != torch.float16 else min(scale, 1.0)).to(dtype)
    src[n // 7 :: 1001] = math.nan
    src[n // 5 :: 1003] = 1e-45
    spans = torch.tensor([[0, n // 3, 1], [n // 3, n // 3, 2], [n // 3, n, 1], [n // 2, n, 0]])
    theirs = torch.ones(3, LIMBS, dtype=torch.int64)
    ours = theirs.cuda()
    kernels.square_sum_(ours, [on_gpu(src, n % 5)], spans, 1.0)
    reference.square_sum_(theirs, [src], spans, 1.0)
    kernels.square_sum_(ours, [on_gpu(src, 0), on_gpu(src, 1), on_gpu(src, 0)], spans, 1 / 3)
    reference.square_sum_(theirs, [src] * 3, spans, 1 / 3)
    assert torch.equal(ours.cpu(), theirs)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 63, 4098])
@pytest.mark.parametrize("by", [0, 1])
def test_exceeds(dtype, at, by):
    for value, limit in ((100.0, 100.0), (math.nan, math.inf), (-math.inf, math.inf), (0.0, 0.0)):
        src, flag = torch.full((4099,), 0.5).to(dtype), torch.zeros(1, dtype=torch.int64, device="cuda")
        kernels.exceeds_(flag, on_gpu(src, by), 0.51)
        assert flag.item() == 0
        src[at] = value
        kernels.exceeds_(flag, on_gpu(src, by), limit)
        assert flag.item() == 1


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack(dtype):
    sizes = [*SIZES, *[k % 9 for k in range(200)]]
    grads = [torch.arange(n).to(dtype) for n in sizes]
    offsets = [1 + sum(-(-n // 64) * 64 for n in sizes[:k]) for k in range(len(sizes))]
    largest = max(float(grad.max()) for grad in grads if grad.numel())
    for clear, limit in ((False, largest), (True, largest * 1.01), (True, 0.5)):
        theirs = torch.ones(offsets[-1] + 100, dtype=dtype)
        ours = theirs.cuda()
        flag, known = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.zeros(1, dtype=torch.int64)
        kernels.pack_(ours, [on_gpu(g, k % 2) for k, g in enumerate(grads)], offsets, clear, flag, limit)
        reference.pack_(theirs, grads, offsets, clear, known, limit)
        assert torch.equal(ours.cpu(), theirs) and flag.item() == known.item() == int(largest >= limit)


@needs_gpu
def test_more_than_2_to_the_31_elements():
    n = 2**31 + 12_345
    if torch.cuda.mem_get_info()[0] < 5 * n:
        pytest.skip("needs 10 GB of device memory")
    src = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    out = torch.ones_like(src)
    src[-1] = 3.0
    kernels.reduce_(out, [src], 1.0, False)
    flag, sums = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.zeros(1, LIMBS, dtype=torch.int64, device="cuda")
    kernels.exceeds_(flag, out, 3.0)
    kernels.square_sum_(sums, [out], torch.tensor([[2, n, 0]]), 1.0)
    assert flag.item() == 1 and out[-1].item() == 3.0 and reference.square_root(sums[0].tolist()) == 3.0
    flag.zero_()
    kernels.pack_(out, [src[-8:].clone()], [n - 16], False, flag, 3.0)
    assert out[n - 9].item() == 3.0 and flag.item() == 1


@needs_gpu
def test_work_follows_the_current_stream():
    src, out = torch.ones(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        src.mul_(2)
        kernels.reduce_(out, [src], 1.0, False)
    stream.synchronize()
    assert bool((out == 2).all())


@needs_gpu
def test_bad_arguments_are_refused():
    param, rest, m, v = (t.cuda() for t in adam_tensors(64, torch.float32))
    spans = torch.tensor([[0, 65, 0]])
    with pytest.raises(RuntimeError, match="outside a tensor of 64"):
        kernels.reduce_adam_(param, rest, m, v, [param.clone()], spans, ROWS, 1.0)
    with pytest.raises(RuntimeError, match="outside a tensor of 64"):
        kernels.reduce_adam_(param, rest, m, v, [param.clone()], spans.cuda(), ROWS, 1.0)
    with pytest.raises(RuntimeError, match="m: expected a tensor on cuda:0"):
        kernels.reduce_adam_(param, rest, m.cpu(), v, [param.clone()], spans, ROWS, 1.0)
    coded_ = [t.cuda() for t in coded(64, "int8", torch.float32)]
    with pytest.raises(RuntimeError, match="starts at 5, expected a multiple of 64"):
        kernels.reduce_adam_moments_(*coded_, [param.clone()], torch.tensor([[5, 64, 0]]), rows_of(1), 1.0)
    with pytest.raises(RuntimeError, match="scales: expected a tensor on cuda:0"):
        scales = coded_[4].cpu()
        kernels.reduce_adam_moments_(*coded_[:4], scales, [param.clone()], torch.tensor([[0, 64, 0]]), rows_of(1), 1.0)
    with pytest.raises(RuntimeError, match="sources: expected a tensor on cuda:0"):
        kernels.reduce_(param, [param.cpu()], 1.0, False)
    with pytest.raises(RuntimeError, match="float32 to accumulate"):
        kernels.reduce_(param.bfloat16(), [param.clone()], 1.0, True)


@needs_gpu
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    spans = torch.tensor([[0, 64, 0], [64, 130, 1]])
    sources = [wide(130, k, 1.0).cuda() for k in (1, 2)]
    args = {
        "reduce_adam_": (*[t.cuda() for t in adam_tensors(130, torch.float32)], sources, spans, ROWS, 0.5),
        "reduce_adam_moments_": (*[t.cuda() for t in coded(130, "int8", torch.float32)], sources, spans, rows_of(1, 2), 0.5),
        "reduce_": (torch.zeros(130, device="cuda"), sources, 0.5, False),
        "square_sum_": (torch.zeros(2, LIMBS, dtype=torch.int64, device="cuda"), sources, spans, 0.5),
        "exceeds_": (torch.zeros(1, dtype=torch.int64, device="cuda"), sources[0], 1.0),
        "pack_": (
            torch.zeros(260, device="cuda"),
            sources,
            [0, 130],
            True,
            torch.zeros(1, dtype=torch.int64, device="cuda"),
            1.0,
        ),
    }[name]
    result = torch.library.opcheck(getattr(torch.ops.zerolite, name).default, args)
    assert set(result.values()) == {"SUCCESS"}
