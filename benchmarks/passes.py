"""The passes beside the update: packing gradients, averaging them, their norm; and the machine's ceilings.

    python -m benchmarks.passes [--elements 32e6] [--threads 2] [--rounds 31]

Each stands beside what torch offers for the same work. A row has bytes and floating-point operations an element, so
that the roofline (docs/bench/roofline.png) can be drawn from it; ceilings are plain loops (stream.cpp).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import native
from benchmarks.harness import Row, interleave, quantiles, ratio, shown, store
from zerolite import kernels

PARTS = 100  # gradients that are packed into one bucket
BF16 = torch.bfloat16


def sides(n: int, threads: int) -> dict[str, tuple[Callable[[], Any], float, float, str | None]]:
    """Call, bytes and operations an element, and the side of zerolite that does the same."""
    grads = [(torch.randn(n // PARTS) * 1e-3).to(BF16) for _ in range(PARTS)]
    size, full = n // PARTS, torch.zeros(n, dtype=BF16)
    offsets = [k * size for k in range(PARTS)]
    sources = [(torch.randn(n) * 1e-3).to(BF16) for _ in range(2)]
    out = torch.zeros(n, dtype=BF16)
    spans, sums = torch.tensor([[0, n, 0]]), torch.zeros(1, kernels.LIMBS, dtype=torch.int64)
    flag = torch.zeros(1, dtype=torch.int64)

    def average() -> None:
        torch.add(sources[0], sources[1], out=out)
        out.mul_(0.5)

    def average_and_norm() -> None:
        average()
        torch._foreach_norm(list(out.split(size)))

    pack, mean, norm, both = "pack", "average of 2", "square sum", "average of 2 and its square sum"
    return {
        pack: (lambda: kernels.pack_(full, grads, offsets, False, flag, 2.0**100), 4, 0, None),
        "torch._foreach_copy_": (lambda: torch._foreach_copy_(list(full.split(size)), grads), 4, 0, pack),
        "torch.cat": (lambda: torch.cat(grads, out=full), 4, 0, pack),
        mean: (lambda: kernels.reduce_(out, sources, 0.5, False), 6, 2, None),
        "torch add and mul_": (average, 10, 2, mean),
        both: (lambda: kernels.reduce_squares_(out, sums.zero_(), sources, spans, 0.5), 6, 4, None),
        "torch add, mul_ and _foreach_norm": (average_and_norm, 12, 4, both),
        "square sum of 2": (lambda: kernels.square_sum_(sums.zero_(), sources, spans, 0.5), 4, 4, None),
        norm: (lambda: kernels.square_sum_(sums.zero_(), [full], spans, 1.0), 2, 2, None),
        "torch.linalg.vector_norm, fp32": (lambda: torch.linalg.vector_norm(full, dtype=torch.float32), 2, 2, norm),
        "torch._foreach_norm": (lambda: torch._foreach_norm(grads), 2, 2, norm),
        "ceiling: read": (native.read(n // 2, threads), 2, 0, None),
        "ceiling: copy": (native.copy(n // 2, threads), 4, 0, None),
        "ceiling: update's streams": (native.update(n, threads), 26, 4, None),
    }


def peak(threads: int) -> float:
    """Operations a second in registers."""
    call, best = native.flops(200_000, threads), 0.0
    for _ in range(5):
        start = time.perf_counter()
        best = max(best, call() / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=float, default=32e6)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    n = int(args.elements) // (64 * PARTS) * 64 * PARTS
    torch.set_num_threads(args.threads)
    kernels.set_threads(args.threads)
    found = sides(n, args.threads)
    seconds = interleave({name: side[0] for name, side in found.items()}, args.rounds, warmup=2)
    most = peak(args.threads)
    print(
        f"\n{n:,} elements, {args.threads} threads, kernels {kernels.kernels_in_use()}, {most / 1e9:.0f} GFLOP/s in registers"
    )
    print(f"{'ns an element':36}{'p20':>9}{'p50':>9}{'p80':>9}{'bytes':>8}{'GB/s':>8}{'against zerolite':>18}")
    rows: list[Row] = []
    for name, (_, moved, work, ours) in found.items():
        each = quantiles(seconds[name], 1e9 / n)
        against = ratio(seconds[name], seconds[ours]) if ours else None
        text = "" if against is None else f"{against:.2f}"
        print(f"{name:36}{each[0]:9.3f}{each[1]:9.3f}{each[2]:9.3f}{moved:8}{moved / each[1]:8.1f}{text:>18}")
        row: Row = {"benchmark": "passes", "side": name, "elements": n, "threads": args.threads, "bytes": moved, "flops": work}
        rows.append({**row, "ns": each, "ratio_to_zerolite": against, "peak_flops": most, "samples": seconds[name]})
        rows[-1]["kernels"] = kernels.kernels_in_use()
    print(f"\nstored in {shown(store('passes', rows))}")


if __name__ == "__main__":
    main()
