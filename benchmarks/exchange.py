"""Exchange, sum, Adam and publish at N ranks, against what moves gradients elsewhere.

    python -m benchmarks.exchange [--ranks 4] [--elements 25e6] [--rounds 21]

zerolite's side is `optimizer.step()` at stage 1 on one bf16 parameter: agreement, exchange, sum in rank order, Adam with
an exact fp32 master, and the new parameters on every rank. The others are single collectives over gloo on tensors of
the same size, which leave the update still to do.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import on_ranks, quantile, ratio, shown, shuffled, store


def worker(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    from zerolite import ZeroOptimizer

    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    n = int(args.elements) // (64 * ranks) * 64 * ranks
    grads = {d: torch.randn(n).to(d) * 1e-3 for d in (torch.bfloat16, torch.float32)}
    shards = {d: torch.empty(n // ranks, dtype=d) for d in grads}
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    whole = torch.empty(n, dtype=torch.bfloat16)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    p = torch.nn.Parameter(torch.randn(n).bfloat16())
    optimizer = ZeroOptimizer(torch.optim.AdamW([p], lr=1e-3), stage=1)

    def prepare() -> None:
        p.backward(grads[torch.bfloat16])  # packs into this rank's slot; the exchange begins in step()

    def nothing() -> None: ...

    def step() -> None:
        optimizer.step()

    sides: dict[str, tuple[Callable[[], None], Callable[[], object]]] = {
        "zerolite: exchange + sum + Adam + publish": (prepare, step),
        "gloo reduce_scatter, bf16": (nothing, lambda: scatter(shards[torch.bfloat16], grads[torch.bfloat16])),
        "gloo reduce_scatter, fp32": (nothing, lambda: scatter(shards[torch.float32], grads[torch.float32])),
        "gloo all_reduce, bf16": (nothing, lambda: dist.all_reduce(grads[torch.bfloat16])),
        "gloo all_gather, bf16": (nothing, lambda: gather(whole, shards[torch.bfloat16])),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number, names in enumerate(shuffled(sides, args.rounds + 2)):
        for name in names:
            before, call = sides[name]
            grads[torch.bfloat16].normal_(0, 1e-3)
            before()
            dist.barrier()
            start = time.perf_counter()
            call()
            dist.barrier()  # the slowest rank counts
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
            optimizer.zero_grad()
    if dist.get_rank() == 0:
        Path(args.out).write_text(json.dumps({"elements": n, "seconds": seconds}))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--elements", type=float, default=25e6)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        return worker(args)
    command = ["benchmarks.exchange", "--elements", str(args.elements), "--rounds", str(args.rounds)]
    found = on_ranks(args.ranks, command, timeout=900)
    if isinstance(found, str):
        raise SystemExit(f"the ranks failed: {found}")
    n, seconds = found["elements"], found["seconds"]
    first = next(iter(seconds))
    # zerolite: N sources, remainder, moments, parameter, the pack is before. Collectives: what each rank sends.
    moved = dict.fromkeys(seconds, n * 2 * (args.ranks - 1) // args.ranks)
    moved[first] = n // args.ranks * (2 * args.ranks + 2 * 4 + 2 * 8)
    moved["gloo reduce_scatter, fp32"] *= 2
    moved["gloo all_reduce, bf16"] *= 2
    print(f"\n{n:,} elements, {args.ranks} ranks, {args.rounds} rounds (bytes: memory for zerolite, wire for gloo; each rank)")
    print(f"{'milliseconds':44}{'p20':>9}{'p50':>9}{'p80':>9}{'MB':>8}{'GB/s':>8}{'time against zerolite':>23}")
    rows = []
    for name, values in seconds.items():
        each = [quantile(values, q) * 1e3 for q in (0.2, 0.5, 0.8)]
        against = ratio(values, seconds[first])
        print(f"{name:44}" + "".join(f"{value:9.1f}" for value in each), end="")
        print(f"{moved[name] / 1e6:8.0f}{moved[name] / each[1] / 1e6:8.1f}{against:23.2f}")
        rows.append({"benchmark": "exchange", "side": name, "elements": n, "ranks": args.ranks, "bytes": moved[name]})
        rows[-1].update(ms=each, ratio_to_zerolite=against, samples=values)
    print(f"\nstored in {shown(store(f'exchange-{args.ranks}', rows))}")
    return None


if __name__ == "__main__":
    main()
