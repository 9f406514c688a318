"""Loss with Adam's moments in fp32, bf16 and int8: the demo's model and text, the same batches, several seeds.

    python -m benchmarks.moments [--steps 300] [--seeds 3] [--model small] [--lr 6e-4] [--jobs 2]

Runs examples/train.py once for each storage and seed, stores every loss in benchmarks/results/moments.jsonl, and draws
docs/moments.png. The figure of a run is its mean loss over the last 20 steps; storages are compared seed by seed.
Losses depend on no timing, so runs go side by side, one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, shown, store

KINDS = ("fp32", "bf16", "int8")
LAST = 20
COLOURS = {"fp32": "#222222", "bf16": "#1f77b4", "int8": "#d62728"}
STYLES = ("solid", "dashed", "dotted")  # of seeds


def run(args: argparse.Namespace, kind: str, seed: int, folder: str) -> dict[str, Any]:
    """One training run in a process of its own; its report."""
    report = Path(folder) / f"{kind}-{seed}.json"
    options = {"steps": args.steps, "model": args.model, "lr": args.lr, "batch": args.batch, "moments": kind, "seed": seed}
    command = [sys.executable, str(ROOT / "examples" / "train.py"), "--out", str(ROOT / "out"), "--json", str(report)]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many threads in every run, or matrix products add in another order
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=one)
    return {**options, **json.loads(report.read_text())}


def end_of(losses: list[float]) -> float:
    return sum(losses[-LAST:]) / LAST


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Smoothed losses above, and below how far each lies from fp32 with the same seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def smooth(losses: list[float]) -> list[float]:
        return [sum(losses[max(0, i - LAST + 1) : i + 1]) / min(LAST, i + 1) for i in range(len(losses))]

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(2, 1))
    curves = {(row["moments"], row["seed"]): smooth(row["losses"]) for row in rows}
    for (kind, seed), curve in curves.items():
        label = {"label": f"{kind} moments"} if seed == 0 else {}
        style = STYLES[seed % len(STYLES)]
        top.plot(curve, linestyle=style, color=COLOURS[kind], linewidth=1, alpha=0.8, **label)
        if kind != "fp32":
            away = [100 * (ours / theirs - 1) for ours, theirs in zip(curve, curves["fp32", seed], strict=True)]
            bottom.plot(away, linestyle=style, color=COLOURS[kind], linewidth=1, alpha=0.8)
    count, parameters = 1 + max(row["seed"] for row in rows), rows[0]["parameters"]
    seeds = ", ".join(f"{STYLES[seed % len(STYLES)]} {seed}" for seed in range(count))
    top.set_title(f"GPT-2 of {parameters / 1e6:.1f} M parameters, mean of {LAST} steps; seeds: {seeds}", fontsize=10)
    top.set_ylabel("loss")
    top.legend(frameon=False)
    bottom.axhline(0, color=COLOURS["fp32"], linewidth=0.8)
    bottom.set_ylabel("% from fp32")
    bottom.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="small")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        pairs = [(kind, seed) for seed in range(args.seeds) for kind in KINDS]
        for report in pool.map(lambda pair: run(args, pair[0], pair[1], folder), pairs):
            kept = ("steps", "model", "lr", "batch", "moments", "seed", "parameters", "losses", "live")
            rows.append({"benchmark": "moments", "end": end_of(report["losses"]), **{name: report[name] for name in kept}})
            seed, kind, end = report["seed"], report["moments"], rows[-1]["end"]
            base = next(row["end"] for row in rows if row["seed"] == seed and row["moments"] == "fp32")
            each = report["live"]["states"] / report["parameters"]
            print(f"seed {seed} {kind:5} loss {end:.4f} {100 * (end / base - 1):+.2f} %  ", end="")
            print(f"{each:.2f} bytes of states a parameter", flush=True)
    for kind in KINDS[1:]:
        both = [(row, other) for row in rows for other in rows if row["seed"] == other["seed"] and other["moments"] == "fp32"]
        away = [100 * (row["end"] / other["end"] - 1) for row, other in both if row["moments"] == kind]
        print(f"{kind}: {sum(away) / len(away):+.2f} % from fp32 (from {min(away):+.2f} to {max(away):+.2f})")
    place = shown(store("moments", rows))
    draw(rows, ROOT / "docs" / "moments.png")
    print(f"stored in {place} and docs/moments.png")


if __name__ == "__main__":
    main()
