"""The largest model that trains within a memory limit, for each system: a bisection over depth.

    zerolite bench largest [--limit 3G] [--ranks 2] [--width 512] [--checkpoint] [--systems "DDP,DeepSpeed,zerolite"]

A GPT-2 shape grows by layers. A size fits where two steps run through while the physical memory of all ranks together
(`harness.physical`: a page that ranks share counts once) stays below the limit; each system builds its model as
sparingly as it can (meta_init, deepspeed.zero.Init, FSDP2 from the meta device). With --checkpoint layers compute their
activations again in the backward, in all systems: what people do who want the largest model. Without, a part of the limit
goes to activations, which no optimizer makes smaller.

Why this and no RLIMIT: RLIMIT_AS and RLIMIT_DATA count address space, also what is never written, and of each process by
itself; RLIMIT_DATA does not see shared memory at all, which would be a gift to zerolite; a cgroup's memory.max is exact
but needs privileges. PSS is what the machine runs out of. It is sampled, every 20 ms and the time it takes to read:
a shorter peak is not seen, in any system.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from benchmarks.harness import OverLimit, Row, shown, store
from benchmarks.models import grown
from benchmarks.progress import Progress
from benchmarks.step import launch
from benchmarks.suite import left_out
from benchmarks.systems import ALONE, choose

DEFAULT = "DDP,FSDP2,DeepSpeed,zerolite 1,zerolite 2,zerolite 3,zerolite 2 + int8 moments,zerolite 3 + int8 moments,"
DEFAULT += "zerolite 3 + step in backward,zerolite 3 + int8 moments + step in backward"
TRIALS = 10.0  # of one search, for the progress bar


def bisect(fits: Callable[[int], bool], start: int, tolerance: float = 0.04, most: int = 4096) -> int:
    """The largest size that fits, as found by doubling or halving from `start` and bisecting to `tolerance`; 0: none.

    fits  is taken as monotone: asked at most once for a size
    """
    low, high, size = 0, most + 1, min(max(start, 1), most)
    while high > most and low < most:  # doubling
        low, high = (size, high) if fits(size) else (low, size)
        size = min(2 * size, most)
    size = high // 2
    while low == 0 and size > 0:  # halving: nothing has fitted yet
        low, high = (size, high) if fits(size) else (low, size)
        size = high // 2
    while low and high - low > max(low * tolerance, 1):
        size = (low + high) // 2
        low, high = (size, high) if fits(size) else (low, size)
    return low


class Search:
    """The trials of one system."""

    def __init__(self, system: str, args: argparse.Namespace, limit: int, progress: Progress) -> None:
        self.system, self.args, self.limit, self.progress = system, args, limit, progress
        self.trials: list[Row] = []

    def fits(self, layers: int) -> bool:
        """Whether two steps run through. Raises RuntimeError for a failure that is not the limit's."""
        shape = grown(layers, self.args.width, checkpoint=self.args.checkpoint)
        numel = count(layers, self.args.width)
        self.progress.say(f"{self.system}: {layers} layers, {numel / 1e6:.0f} M parameters")
        trial: Row = {"layers": layers, "numel": numel}
        self.trials.append(trial)
        options: dict[str, Any] = {"warmup": 1, "lean": True, "device": self.args.device}
        try:
            result = launch(self.system, shape, self.args.ranks, 1, limit=self.limit, timeout=self.args.timeout, **options)
        except OverLimit as error:
            trial |= {"fits": False, "peak": error.peak}
            return False
        if isinstance(result, str):
            raise RuntimeError(result)
        trial |= {"fits": True, "peak": result["peak"], "loss": result["losses"][-1], "settings": result["settings"]}
        return True


def count(layers: int, width: int) -> int:
    """Parameters of a grown model, from two small ones: layers are all alike."""
    one, two = grown(1, width).count(), grown(2, width).count()
    return one + (layers - 1) * (two - one)


def first_guess(limit: int, ranks: int, width: int) -> int:
    """Layers at 12 bytes a parameter and rank, above 350 MB of imports."""
    room = max(limit - ranks * 350e6, 1)
    layer = count(2, width) - count(1, width)
    return max(int(room / ranks / 12 - count(1, width)) // layer, 1)


def search(names: list[str], args: argparse.Namespace, limit: int) -> list[Row]:
    """One row for each system."""
    progress = Progress([TRIALS] * len(names))
    rows: list[Row] = []
    common = {"benchmark": "largest", "ranks": args.ranks, "limit": limit, "width": args.width, "device": args.device}
    if args.checkpoint:
        common["checkpoint"] = True
    for name in names:
        progress.next(f"largest model, {name}")
        trials = Search(name, args, limit, progress)
        try:
            layers = bisect(trials.fits, args.start or first_guess(limit, args.ranks, args.width), args.tolerance)
        except RuntimeError as error:
            progress.say(f"{name} failed and is left out: {error}")
            rows.append({**left_out(name, args.ranks, str(error), "failed"), "trials": trials.trials})
            continue
        good = [trial for trial in trials.trials if trial.get("fits") and trial["layers"] == layers]
        found: Row = {"system": name, "layers": layers, "numel": count(layers, args.width) if layers else 0}
        rows.append({**common, **found, "best": good[-1] if good else None, "trials": trials.trials})
        progress.say(f"{name}: {found['numel'] / 1e6:.0f} M parameters")
    progress.end("searched")
    return rows


def main() -> None:
    from benchmarks.suite import default_device
    from zerolite.shapes import parse_bytes

    parser = argparse.ArgumentParser(
        prog="zerolite bench largest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", default="3G", help="of all ranks together, in physical memory (3G)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=512, help="of the model; a layer has 12 x width^2 parameters (512)")
    parser.add_argument("--checkpoint", action="store_true", help="with activation checkpointing, in all systems")
    parser.add_argument("--systems", default=DEFAULT)
    parser.add_argument("--tolerance", type=float, default=0.04, help="where the bisection stops (0.04)")
    parser.add_argument("--start", type=int, help="layers to begin with")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of one trial")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    args = parser.parse_args()
    args.device = args.device or default_device()
    if args.device == "cuda":
        raise SystemExit(
            "zerolite bench largest: measures host memory; on a GPU give --device cpu (zerolite plan tells the GPU's)"
        )
    limit = parse_bytes(args.limit, "--limit")
    assert limit is not None
    try:
        names, missing = choose(args.systems, args.ranks, args.device == "cuda", False)
    except ValueError as error:
        parser.error(str(error))
    for name, why in missing.items():
        print(f"left out: {name}: {why}")
    rows = search([name for name in names if name != ALONE], args, limit)
    rows += [left_out(name, args.ranks, why, "skipped") for name, why in missing.items()]
    name = f"largest-{args.ranks}-{limit / 1e9:g}GB" + "-checkpoint" * args.checkpoint
    print(f"stored in {shown(store(name, rows))}")


if __name__ == "__main__":
    main()
