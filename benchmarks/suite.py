"""Every system on every model and world, and the parts beside: what `zerolite bench` and `make bench` run.

    zerolite bench [--preset quick|standard|full] [--resume] [--dry-run]
    zerolite bench --models gpt2-49M,llama-56M --worlds 1,2,4 --systems DDP,DeepSpeed,zerolite --rounds 3 --steps 8

A block is one model at one world size. Its systems run interleaved, and its rows go to RESULTS/step-MODEL-WORLD.jsonl
when it is complete; --resume passes over blocks that this commit has already measured with the same settings.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import NO_RESULT, ROOT, Row, commit, shown, store
from benchmarks.models import KNOWN, MODELS
from benchmarks.progress import Progress, show
from benchmarks.step import launch, summary
from benchmarks.systems import ALONE, choose

PARTS = {"update": 70.0, "passes": 30.0, "exchange": 40.0, "footprint": 90.0, "small": 200.0}
PARTS |= {"largest": 3000.0, "scale": 60.0, "construct": 900.0}
QUIET = {"update": ["--rounds", "3", "--elements", "4e6"], "passes": ["--rounds", "3", "--elements", "4e6"]}


SAME = ("commit", "cpu", "cores", "gpu", "versions")  # of rows that --resume keeps


@dataclass(frozen=True)
class Block:
    """One model at one world size."""

    model: str
    world: int
    core: bool  # the core systems only
    rounds: int
    steps: int
    warmup: int = 2
    systems: str | None = None

    @property
    def name(self) -> str:
        return f"step-{self.model}-{self.world}"

    @property
    def settings(self) -> Row:
        return {"rounds": self.rounds, "steps": self.steps, "warmup": self.warmup, "core": self.core, "wanted": self.systems}

    def weight(self, steps: int) -> float:
        """Seconds of one launch, by a rough guess from 2 cores; only proportions matter."""
        shape = KNOWN[self.model]
        work = shape.count() * shape.tokens * 6 * max(self.world, 2) / 3e11 + 0.05  # a step
        return 5.0 + self.world + work * (steps + self.warmup + 2) + shape.count() * 2e-8


FEW = "DDP,FSDP2,DeepSpeed 2,DeepSpeed 3 + offload,zerolite 1,zerolite 2,zerolite 3"
PRESETS: dict[str, tuple[list[Block], list[str]]] = {
    "quick": ([Block("gpt2-5M", 2, True, 1, 2, 1)], ["update", "passes"]),
    "standard": (
        [
            Block("gpt2-49M", 2, False, 4, 8),
            *(Block("gpt2-49M", world, True, 1, 6) for world in (1, 4)),
            *(Block(model, 2, False, 1, 6, systems=FEW) for model in ("llama-56M", "moe-22M")),
        ],
        ["update", "passes", "exchange", "footprint", "scale"],
    ),
    "full": ([Block(model, world, False, 3, 8) for model in MODELS for world in (1, 2, 4)], list(PARTS)),
}


# ---- one block


def measure(block: Block, names: list[str], device: str, progress: Progress) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Interleaved runs of each system, the first of which samples memory and is not timed; and why others failed."""
    found: dict[str, list[Row]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    shape = KNOWN[block.model]
    for number in range(block.rounds + 1):
        for name in names:
            if name in failed:
                progress.skip(1)
                continue
            what = f"round {number}/{block.rounds}" if number else "memory"
            progress.next(f"{block.model} x{block.world}, {what}, {name}")
            steps = block.steps if number else 2
            for left in (1, 0):
                result = launch(name, shape, block.world, steps, warmup=block.warmup, device=device, sample=number == 0)
                if not isinstance(result, str) or result.startswith(NO_RESULT):
                    break
                if left:
                    progress.say(f"{block.model} x{block.world}: {name} failed and is tried once more: {result}")
            if isinstance(result, str):
                progress.say(f"{block.model} x{block.world}: {name} failed and is left out: {result}")
                failed[name] = result
                found.pop(name)
                if name == ALONE:  # without it there is no overhead to tell
                    progress.skip((block.rounds + 1) * len(names) - 1)
                    return {}, dict.fromkeys(names, f"model alone failed: {result}")
            else:
                found[name].append(result)
    return found, failed


def run_block(block: Block, device: str, progress: Progress) -> Path:
    """Measures one block and stores its rows; what was left out is a row as well."""
    names, missing = choose(block.systems, block.world, device == "cuda", block.core)
    found, failed = measure(block, names, device, progress)
    shape, path = KNOWN[block.model], harness.RESULTS / f"{block.name}.jsonl"
    if ALONE in failed and path.exists():
        progress.say(f"{block.model} x{block.world}: what was measured before stays")
        return path
    rows = [summary(name, shape, block.world, runs, found.get(ALONE, [])) for name, runs in found.items()]
    rows += [left_out(name, block.world, why, "skipped") for name, why in missing.items()]
    rows += [left_out(name, block.world, why, "failed") for name, why in failed.items()]
    return store(block.name, [{**row, "model": block.model, "device": device, "block": block.settings} for row in rows])


def left_out(name: str, world: int, why: str, kind: str) -> Row:
    return {"benchmark": kind, "system": name, "ranks": world, "why": why}


def measured(block: Block, device: str) -> bool:
    """Whether this commit has measured the block already, with the same settings on the same machine, and nothing failed or can
    run now that could not."""
    rows = harness.read(harness.RESULTS / f"{block.name}.jsonl")
    if not rows or not commit() or commit().endswith("+changes"):
        return False
    here = harness.conditions()
    _, missing = choose(block.systems, block.world, device == "cuda", block.core)
    skipped = {row["system"] for row in rows if row["benchmark"] == "skipped"}
    same = all((row.get("block"), row.get("device")) == (block.settings, device) for row in rows)
    same = same and all(row["conditions"][name] == here[name] for row in rows for name in SAME)
    return same and skipped == set(missing) and not any(row["benchmark"] == "failed" for row in rows)


# ---- all of them


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    device = args.device or default_device()
    blocks, parts = selection(args)
    kept = [block for block in blocks if args.resume and measured(block, device)]
    blocks = [block for block in blocks if block not in kept]
    jobs = [weights(block, device) for block in blocks]
    total = sum(map(sum, jobs)) + sum(PARTS[part] for part in parts)
    tell(blocks, kept, parts, device, total)
    if args.dry_run:
        return
    progress = Progress([*(w for block in jobs for w in block), *(PARTS[part] for part in parts)])
    for block in blocks:
        path = run_block(block, device, progress)
        progress.say(f"{block.model} x{block.world}: stored in {shown(path)}")
    for part in parts:
        progress.next(part)
        run_part(part, args.preset == "quick", progress)
    progress.end("measured")
    from benchmarks.report import write

    for path in write(harness.RESULTS, args.docs):
        print(f"wrote {shown(path)}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="zerolite bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="standard", help="quick 5, standard 45 minutes, full a night")
    parser.add_argument("--models", help=f"comma-separated, of {', '.join(KNOWN)}")
    parser.add_argument("--worlds", help="comma-separated numbers of ranks, such as 1,2,4")
    parser.add_argument("--systems", help="comma-separated names or beginnings of names (`zerolite bench list`)")
    parser.add_argument("--parts", help=f"comma-separated, of step, {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, help="timed rounds")
    parser.add_argument("--steps", type=int, help="timed steps of a round")
    parser.add_argument("--warmup", type=int, help="steps before them")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--docs", type=Path, default=None, help="folder of the page and the plots; default: beside the results")
    parser.add_argument("--resume", action="store_true", help="leave out what this commit has measured already")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and how long it takes")
    args = parser.parse_args(arguments)
    for name, known in (("models", KNOWN), ("parts", ["step", *PARTS])):
        unknown = [item for item in (getattr(args, name) or "").split(",") if item and item not in known]
        if unknown:
            parser.error(f"--{name}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    try:
        choose(args.systems, 1, False, False)
    except ValueError as error:
        parser.error(str(error))
    worlds = (args.worlds or "1").split(",")
    if not all(world.isdigit() and int(world) > 0 for world in worlds) or len(set(worlds)) < len(worlds):
        parser.error(f"--worlds: expected different numbers of ranks such as 1,2,4, got {args.worlds}")
    for name, least in (("rounds", 1), ("steps", 1), ("warmup", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name}: expected at least {least}, got {value}")
    return args


def selection(args: argparse.Namespace) -> tuple[list[Block], list[str]]:
    """The preset's blocks and parts, with what the options put in their place."""
    blocks, parts = PRESETS[args.preset]
    changes = {name: value for name in ("rounds", "steps", "warmup", "systems") if (value := getattr(args, name)) is not None}
    if args.models or args.worlds:
        models = args.models.split(",") if args.models else list(dict.fromkeys(block.model for block in blocks))
        worlds = [int(w) for w in args.worlds.split(",")] if args.worlds else list(dict.fromkeys(b.world for b in blocks))
        blocks = [replace(blocks[0], model=model, world=world) for model in models for world in worlds]
        parts = []
    if args.parts:
        asked = args.parts.split(",")
        blocks, parts = blocks if "step" in asked else [], [part for part in PARTS if part in asked]
    elif changes:
        parts = []
    blocks = [replace(block, **changes, core=block.core and not args.systems) for block in blocks]
    return blocks, parts


def weights(block: Block, device: str) -> list[float]:
    """A weight for each launch of a block."""
    names, _ = choose(block.systems, block.world, device == "cuda", block.core)
    return [block.weight(block.steps if number else 2) for number in range(block.rounds + 1) for _ in names]


def tell(blocks: list[Block], kept: list[Block], parts: list[str], device: str, total: float) -> None:
    """What will run, and what is left out and why."""
    print(f"about {show(total)} on {device}: {len(blocks)} block(s), parts: {', '.join(parts) or 'none'}")
    for block in blocks:
        names, missing = choose(block.systems, block.world, device == "cuda", block.core)
        print(f"  {block.model} at {block.world} rank(s), {block.rounds} round(s) of {block.steps} steps: {', '.join(names)}")
        for name, why in missing.items():
            print(f"    left out: {name}: {why}")
    for block in kept:
        print(f"  {block.model} at {block.world} rank(s): measured already")


def run_part(part: str, quiet: bool, progress: Progress) -> None:
    """One of the other benchmarks, in a process of its own; its output is shown when it is done."""
    command = [sys.executable, "-m", f"benchmarks.{part}", *(QUIET.get(part, []) if quiet else [])]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    progress.say(
        done.stdout.strip() if done.returncode == 0 else f"{part} failed and is left out: {done.stderr.strip()[-500:]}"
    )


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
