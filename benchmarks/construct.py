"""Layout and start-up of 1,024 ranks, really executed in one process, rank after rank: time and memory of each.

    zerolite bench construct [--ranks 1024] [--model llama-130M] [--stages 1,2,3] [--every 1]

Each rank builds its ZeroOptimizer as in a job of that size; only the Comm is ours: `share` answers as if all ranks had said
the same, on hosts of eight, and nothing moves. Real are the checks, layouts, cuts, buffers, hooks and states, as rank r of N
has them; not in it are the group's own start-up and its collectives. The pieces of all ranks are then put together: every
element of every parameter must be owned exactly once.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Row, physical, quantiles, shown, store
from benchmarks.models import KNOWN, Shape
from benchmarks.progress import Progress
from zerolite import ZeroOptimizer, meta_init
from zerolite.comm.lane import Lane, LaneSpec, message_lanes
from zerolite.comm.ledger import Ledger
from zerolite.comm.local import Done
from zerolite.host import trim_heap

HERE = 8  # ranks of a host


class LoneComm:
    """The Comm of rank `rank` of `size`, without the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.ledger = rank, size, Ledger()

    def exchange(self, full: Tensor, what: str) -> Done:
        self.ledger.enter(what, full.nbytes * (self.size - 1) // self.size)
        return Done(torch.zeros(self.size, full.numel() // self.size, dtype=full.dtype))

    def gather(self, full: Tensor, shard: Tensor, what: str) -> Done:
        self.ledger.enter(what, shard.nbytes * (self.size - 1))
        full.view(self.size, -1)[self.rank].copy_(shard)
        return Done(full)

    def sum_(self, values: Tensor, what: str) -> None:
        self.ledger.enter(what, values.nbytes)

    def max_(self, values: Tensor, what: str) -> None:
        self.ledger.enter(what, values.nbytes)

    def broadcast_(self, values: Tensor, what: str) -> None:
        self.ledger.enter(what, values.nbytes)

    def share(self, value: Any, what: str) -> list[Any]:
        self.ledger.enter(what, 0)
        if what in ("set-up hosts", "set-up memory"):  # (host, ...) of each rank: eight to a host
            return [(value[0] if r // HERE == self.rank // HERE else f"host {r // HERE}", *value[1:]) for r in range(self.size)]
        return [value] * self.size

    def lanes(self, specs: Sequence[LaneSpec], device: torch.device) -> list[Lane]:
        return message_lanes(self, specs, device)

    def beside(self) -> LoneComm:
        return LoneComm(self.rank, self.size)

    def home(self, numel: int, dtype: torch.dtype, sharded: bool) -> None:
        return None


def build(shape: Shape, stage: int, rank: int, size: int) -> tuple[Any, ZeroOptimizer]:
    """One rank's model and optimizer; its parameters begin on the meta device and are left unset."""
    with meta_init(False):
        model = shape.build()
    optimizer = ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage=stage, process_group=LoneComm(rank, size))
    return model, optimizer


def owned(optimizer: ZeroOptimizer) -> dict[str, list[tuple[int, int]]]:
    """Ranges of each parameter's elements that this rank updates."""
    found: dict[str, list[tuple[int, int]]] = {}
    for bucket in optimizer._trained:
        for piece in bucket.pieces:
            found.setdefault(bucket.entries[piece.slot].name, []).append((piece.start, piece.stop))
    return found


def check(pieces: dict[str, list[tuple[int, int]]], sizes: dict[str, int]) -> None:
    """Raises AssertionError unless the ranges cut every parameter without gap or overlap."""
    assert set(pieces) == set(sizes), set(sizes) ^ set(pieces)
    for name, ranges in pieces.items():
        reached = 0
        for start, stop in sorted(ranges):
            assert start == reached and stop > start, f"{name}: {start} after {reached}"
            reached = stop
        assert reached == sizes[name], f"{name}: {reached} of {sizes[name]} elements are owned"


def construct(model: str, stage: int, size: int, every: int, progress: Progress) -> Row:
    """Builds ranks 0, every, 2 every, ...; seconds and bytes of each, and whether the pieces fit together."""
    shape, pieces, sizes = KNOWN[model], dict[str, list[tuple[int, int]]](), dict[str, int]()
    seconds: list[float] = []
    held: list[int] = []
    ranks = list(range(0, size, every))
    for rank in ranks:
        progress.next(f"stage {stage}, rank {rank} of {size}")
        gc.collect()
        trim_heap()
        before = physical([os.getpid()], 1)
        start = time.perf_counter()
        built, optimizer = build(shape, stage, rank, size)
        seconds.append(time.perf_counter() - start)
        held.append(physical([os.getpid()], 1) - before)
        for name, ranges in owned(optimizer).items():
            pieces.setdefault(name, []).extend(ranges)
        sizes = sizes or {name: p.numel() for name, p in shape_parameters(shape)}
        rest = optimizer.plan.bytes_at_rest
        optimizer.remove_hooks()
        del built, optimizer
    if every == 1:
        check(pieces, sizes)
    row: Row = {"benchmark": "construct", "model": model, "numel": sum(sizes.values()), "stage": stage, "ranks": size}
    row |= {"built": len(ranks), "seconds": quantiles(seconds[1:] or seconds), "held": quantiles([float(h) for h in held])}
    return {**row, "planned": sum(rest.values()), "covered": every == 1, "samples": seconds}


def shape_parameters(shape: Shape) -> list[tuple[str, torch.nn.Parameter]]:
    with torch.device("meta"):
        return list(shape.build().named_parameters())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="zerolite bench construct", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--model", choices=KNOWN, default="llama-130M")
    parser.add_argument("--stages", default="1,2,3")
    parser.add_argument("--every", type=int, default=1, help="build each so many-th rank only; then coverage is not checked")
    args = parser.parse_args()
    stages = [int(stage) for stage in args.stages.split(",")]
    progress = Progress([1.0] * len(stages) * len(range(0, args.ranks, args.every)))
    rows = []
    for stage in stages:
        row = construct(args.model, stage, args.ranks, args.every, progress)
        rows.append(row)
        text = f"stage {stage}: {row['built']} of {row['ranks']} ranks, {row['seconds'][1]:.3f} s each, "
        text += f"{row['held'][1] / 1e6:.1f} MB held ({row['planned'] / 1e6:.1f} planned at rest)"
        progress.say(text + (", every element owned exactly once" if row["covered"] else ""))
    print(f"stored in {shown(store('construct', rows))}")


if __name__ == "__main__":
    main()
