"""The host update: averaged bf16 gradients in, exact fp32 master and moments (or rounded ones), bf16 parameters out.

    python -m benchmarks.update [--elements 64e6] [--threads 2] [--rounds 31]

Peers do the same work with what they offer: cast the gradient to fp32, scale it by the clip factor, Adam on fp32 master
and moments, cast the parameter to bf16. A peer that is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from benchmarks.harness import interleave, quantile, ratio, shown, store

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from benchmarks import native
from zerolite import kernels
from zerolite.buffer import Room
from zerolite.kernels.reference import split_
from zerolite.layout import STAGGER
from zerolite.moments import MOMENTS
from zerolite.update import adam_row

GROUP = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "maximize": False, "decoupled_weight_decay": True}
CLIP = 0.7


def zerolite_side(n: int, sources: int, moments: str = "fp32") -> Callable[[], None]:
    """Sum of `sources` bf16 gradients, scale, Adam with stored moments, split master."""
    room = Room(torch.device("cpu"))
    param, rest = torch.empty(n, dtype=torch.bfloat16), room.zeros(n, torch.int16)
    split_(param, rest, torch.randn(n))
    slot = n + STAGGER // 2  # as in a region of shared memory
    slots = (torch.randn(slot * sources) * 1e-3).bfloat16()
    grads = [slots[k * slot : k * slot + n] for k in range(sources)]
    stored, part = MOMENTS[moments](n, room), slice(0, n)
    stored.write(part, torch.randn(n) * 1e-3, torch.rand(n) * 1e-6)
    rows, spans = [(*adam_row(GROUP, 10, CLIP), 10.0)], torch.tensor([[0, n, 0]])
    return lambda: stored.update(param, rest, grads, spans, rows, 1.0 / sources)


class Plain:
    """fp32 master and gradient buffers around a peer's fp32 Adam."""

    def __init__(self, n: int) -> None:
        self.master = torch.nn.Parameter(torch.randn(n))
        self.total = self.master.grad = torch.zeros(n)
        self.param = self.master.detach().bfloat16()
        self.grad = (torch.randn(n) * 1e-3).bfloat16()

    def whole(self, step: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            self.total.copy_(self.grad)
            self.total.mul_(CLIP)
            step()
            self.param.copy_(self.master.detach())

        return run


def torch_side(n: int) -> Callable[[], None]:
    plain = Plain(n)
    return plain.whole(torch.optim.AdamW([plain.master], lr=1e-3, weight_decay=0.1, fused=True).step)


def deepspeed_sides(n: int) -> dict[str, Callable[[], None]]:
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError:
        print("left out: DeepSpeed is not installed (make peers)")
        return {}
    plain = Plain(n)
    adam = DeepSpeedCPUAdam([plain.master], lr=1e-3, weight_decay=0.1, adamw_mode=True)
    return {"DeepSpeed, whole path": plain.whole(adam.step), "DeepSpeedCPUAdam, fp32 update alone": adam.step}


BYTES = {
    "zerolite": 26,
    "zerolite, 2 sources": 28,
    "zerolite, 4 sources": 32,
    "zerolite, bf16 moments": 18,
    "zerolite, int8 moments": 14,
    "zerolite, int8 moments, 2 sources": 16,
    "read-modify-write loop, same streams": 26,
    "torch AdamW(fused), whole path": 48,
    "DeepSpeed, whole path": 48,
    "DeepSpeedCPUAdam, fp32 update alone": 28,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=float, default=64e6)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    n = int(args.elements) // 64 * 64
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    kernels.set_threads(args.threads)
    sides = {
        "zerolite": zerolite_side(n, 1),
        "zerolite, 2 sources": zerolite_side(n, 2),
        "zerolite, 4 sources": zerolite_side(n, 4),
        "zerolite, bf16 moments": zerolite_side(n, 1, "bf16"),
        "zerolite, int8 moments": zerolite_side(n, 1, "int8"),
        "zerolite, int8 moments, 2 sources": zerolite_side(n, 2, "int8"),
        "read-modify-write loop, same streams": native.update(n, args.threads),
        "torch AdamW(fused), whole path": torch_side(n),
        **deepspeed_sides(n),
    }
    seconds = interleave(sides, args.rounds, warmup=2)
    print(f"\n{n:,} elements, {args.threads} threads, kernels {kernels.kernels_in_use()}, {args.rounds} rounds")
    print(f"{'':40}{'ns a parameter':>27}{'bytes':>8}{'GB/s':>8}{'time against':>14}")
    print(f"{'':40}{'p20':>9}{'p50':>9}{'p80':>9}{'':8}{'':8}{'zerolite':>14}")
    rows = []
    for name, values in seconds.items():
        each = [quantile(values, q) / n * 1e9 for q in (0.2, 0.5, 0.8)]
        against = ratio(values, seconds["zerolite"])
        print(f"{name:40}{each[0]:9.3f}{each[1]:9.3f}{each[2]:9.3f}{BYTES[name]:8}{BYTES[name] / each[1]:8.1f}{against:14.2f}")
        rows.append({"benchmark": "update", "side": name, "elements": n, "threads": args.threads, "bytes": BYTES[name]})
        rows[-1].update(ns=each, ratio_to_zerolite=against, samples=values, kernels=kernels.kernels_in_use())
    print(f"\nstored in {shown(store('update', rows))}")


if __name__ == "__main__":
    main()
