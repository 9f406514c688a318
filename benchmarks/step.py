"""Seconds, overhead and memory of a training step, systems side by side.

    python benchmarks/step.py [--systems "zerolite 2,DDP + AdamW(fused)"] [--ranks 2] [--rounds 3] [--steps 8]

Every system runs in fresh processes, one thread a rank, A B C A B C ...; a round's overhead is its step minus that round's
"model alone" (forward and backward in as many processes, without communication). One more round, not timed, samples the
processes' memory: the sum over ranks of PSS, so that a page that ranks share counts once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from harness import ROOT, on_ranks, quantile, store

PHASES = ("forward", "backward", "update")
SHAPES = {  # GPT-2 shape: layers, width, heads, vocabulary
    "5M": (4, 256, 4, 8000),
    "49M": (8, 512, 8, 46000),
    "124M": (12, 768, 12, 50257),
}


def worker(args: argparse.Namespace) -> None:
    """One rank: runs the steps and, on rank 0, writes what was measured to args.out."""
    import torch
    import torch.distributed as dist
    from systems import SYSTEMS
    from transformers import GPT2Config, GPT2LMHeadModel

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    layers, width, heads, words = SHAPES[args.model]
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=words, n_positions=128)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config).to(torch.bfloat16)
    numel = sum(p.numel() for p in model.parameters())
    base = time.perf_counter()
    trained = SYSTEMS[args.system](model, rank)
    build = time.perf_counter() - base
    generator = torch.Generator().manual_seed(rank)
    times: dict[str, list[float]] = {phase: [] for phase in PHASES}
    loss, sent = 0.0, trained.sent()
    for step in range(args.steps + args.warmup):
        batch = torch.randint(0, words, (2, 64), generator=generator)
        marks = [time.perf_counter()]
        result = trained.forward(batch)
        marks.append(time.perf_counter())
        trained.backward(result)
        marks.append(time.perf_counter())
        trained.update()
        marks.append(time.perf_counter())
        loss = float(result.detach())
        if step == 0:
            first = marks[-1] - marks[0]
            sent = trained.sent()
        if step >= args.warmup:
            for phase, start, stop in zip(PHASES, marks, marks[1:], strict=False):
                times[phase].append(stop - start)
    if rank == 0:
        wire = (trained.sent() - sent) / (args.steps + args.warmup - 1) if sent >= 0 else None
        found = {"numel": numel, "build": build, "first": first, "loss": loss, "wire": wire, "times": times}
        Path(args.out).write_text(json.dumps({**found, "settings": trained.settings}))
    dist.barrier()
    dist.destroy_process_group()


def launch(system: str, args: argparse.Namespace, steps: int, sample: bool) -> dict[str, Any] | str:
    """Runs one system once; returns what rank 0 measured, or why it failed."""
    command = [__file__, "--worker", system, "--steps", str(steps), "--model", args.model, "--warmup", str(args.warmup)]
    return on_ranks(args.ranks, command, args.timeout, sample)


def measure(systems: list[str], args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Interleaved rounds; the first, which also samples memory, is not timed."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    start, done, total = time.monotonic(), 0, len(systems) * (args.rounds + 1)
    for number in range(args.rounds + 1):
        for name in list(found):
            left = (time.monotonic() - start) / max(done, 1) * (total - done)
            print(
                f"\r[{done}/{total}] round {number}, {name}, {left:.0f} s left".ljust(78), end="", file=sys.stderr, flush=True
            )
            result = launch(name, args, 2 if number == 0 else args.steps, sample=number == 0)
            done += 1
            if isinstance(result, str):
                print(f"\n{name} failed and is left out: {result}", file=sys.stderr)
                del found[name]
            else:
                found[name].append(result)
    print("\r".ljust(79) + "\r", end="", file=sys.stderr)
    return found


def summary(name: str, runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one system: seconds by phase, and the overhead over the model alone, round by round."""
    timed = runs[1:]
    phases = {p: quantile([quantile(run["times"][p], 0.5) for run in timed], 0.5) for p in PHASES}

    def step(run: dict[str, Any]) -> float:
        return sum(quantile(run["times"][p], 0.5) for p in PHASES)

    over = [step(run) - step(alone) for run, alone in zip(timed, base[1:], strict=True)]
    row = {"benchmark": "step", "system": name, "numel": runs[0]["numel"], **phases, "overhead": quantile(over, 0.5)}
    row |= {"overheads": over, "step": quantile([step(run) for run in timed], 0.5), "first": runs[0]["first"]}
    row |= {"build": runs[0]["build"], "loss": timed[-1]["loss"], "wire": timed[-1]["wire"], "peak": runs[0]["peak"]}
    return {**row, "settings": runs[0]["settings"], "samples": [run["times"] for run in timed]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", help="comma-separated; default: all")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--model", choices=SHAPES, default="49M")
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--worker", dest="system", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.system:
        return worker(args)
    from systems import NEEDS, SYSTEMS

    wanted = [name.strip() for name in args.systems.split(",")] if args.systems else list(SYSTEMS)
    unknown = [name for name in wanted if name not in SYSTEMS]
    if unknown:
        parser.error(f"unknown systems {unknown}; known: {list(SYSTEMS)}")
    systems = ["model alone", *(name for name in wanted if name != "model alone")]
    for name in list(systems):
        package = NEEDS.get(name.split()[0])
        if package and importlib.util.find_spec(package) is None:
            print(f"left out: {name}, {package} is not installed (make peers)")
            systems.remove(name)
    found = measure(systems, args)
    rows = [summary(name, runs, found["model alone"]) for name, runs in found.items()]
    show(rows, args)
    stored = store(f"step-{args.model}-{args.ranks}", [{**row, "ranks": args.ranks, "model": args.model} for row in rows])
    print(f"\nstored in {stored.relative_to(ROOT)}")
    return None


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    print(
        f"\nGPT-2 shape, {rows[0]['numel'] / 1e6:.1f} M parameters, bf16, {args.ranks} ranks, 2 x 64 tokens a rank, clipping on"
    )
    print(
        f"{'seconds':26}{'forward':>9}{'backward':>9}{'update':>9}{'step':>9}{'overhead':>10}{'first':>8}{'MB, all ranks':>15}"
    )
    for row in rows:
        phases = "".join(f"{row[p]:9.3f}" for p in PHASES)
        print(
            f"{row['system']:26}{phases}{row['step']:9.3f}{row['overhead']:10.3f}{row['first']:8.2f}{row['peak'] / 2**20:15.0f}"
        )
    ours = [row for row in rows if row["system"].startswith("zerolite")]
    for peer in ("DDP", "DeepSpeed"):
        best = min((row for row in rows if row["system"].startswith(peer)), key=lambda row: row["overhead"], default=None)
        for row in ours if best else []:
            part = row["overhead"] / best["overhead"]
            print(f"overhead of {row['system']}: {part:.2f} of {best['system']}'s")


if __name__ == "__main__":
    main()
