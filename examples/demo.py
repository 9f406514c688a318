"""Trains the same small GPT-2 with DDP and at every ZeRO stage, two ranks each, and compares: `make demo`.

Prints loss, time and memory of the runs, checks that every zerolite run ends in the same bits, and draws out/demo.png.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out"
SCRIPT = str(ROOT / "examples" / "train.py")
RANKS = 2
STEPS = 90
SIZES = ["--model", "small", "--steps", str(STEPS), "--batch", "6", "--context", "96"]
TRAINING = [*SIZES, "--lr", "7e-4", "--seed", "0", "--out", str(OUT)]
RUNS = {
    "DDP, all bf16": ["--stage", "ddp"],
    "stage 1": ["--stage", "1"],
    "stage 2": ["--stage", "2"],
    "stage 3": ["--stage", "3"],
    "stage 2 + offload": ["--stage", "2", "--offload", "states"],
}
TERMS = {"params": "#4c72b0", "grads": "#dd8452", "states": "#55a868"}  # and their colours
# Bytes a parameter of mixed-precision Adam without ZeRO: bf16 parameters and gradients, fp32 master and two moments.
UNSHARDED = {"params": 2, "grads": 2, "states": 12}

Result = dict[str, Any]  # what train.py writes with --json


def train(name: str, options: list[str]) -> Result:
    """One run of train.py over RANKS ranks; returns its report."""
    report = OUT / "demo" / f"{'-'.join(options[1::2])}.json"
    report.unlink(missing_ok=True)
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    start(name, [*ranks, SCRIPT, *options, *TRAINING, "--json", str(report)])
    return json.loads(report.read_text())


def start(name: str, command: list[str]) -> None:
    """Runs Python with `command`, its progress bar on the terminal; exits where it fails."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # torchrun's own default, without its notice
    done = subprocess.run([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise SystemExit(f"demo: the run '{name}' failed with exit status {done.returncode}; its error is above.")


def each(result: Result, kind: str, term: str) -> float:
    """Bytes a parameter of a term, or of all terms ("total"), "planned" or "live"."""
    found = result[kind]
    return (sum(found.values()) if term == "total" else found[term]) / result["parameters"]


# ---- the table


def table(results: dict[str, Result]) -> str:
    """One row for each run."""
    terms = [*TERMS, "total"]
    lines = [
        f"{'':19}{'loss':>14}{'seconds':>11}   {'bytes a parameter at rest on a rank: formula, measured':60}{'peak of a':>11}",
        f"{'run':19}{'first':>8}{'last':>8}{'a step':>9}   " + "".join(f"{term:^15}" for term in terms) + f"{'process':>11}",
    ]
    for name, result in results.items():
        first, last = result["losses"][0], result["losses"][-1]
        cells = "".join(f"{each(result, 'planned', t):>7.3f}{each(result, 'live', t):>7.3f} " for t in terms)
        peak = f"{max(result['peak']) / 2**20:,.0f} MiB"
        lines.append(f"{name:19}{first:>8.3f}{last:>8.3f}{statistics.median(result['seconds']):>9.3f}   {cells}{peak:>11}")
    rule = "-" * max(map(len, lines))
    return "\n".join([*lines[:2], rule, *lines[2:], rule])


def notes() -> str:
    """What the table's numbers are made of, so that nobody compares unlike things."""
    many, whole = 64, sum(UNSHARDED.values())
    return f"""\
DDP      keeps everything in bf16: 4 bytes of states are two bf16 moments, and there is no fp32 master.
stages   keep bf16 parameters and gradients, two fp32 moments and the low 16 bits of an fp32 master (10 bytes of states).
         Mixed-precision Adam without ZeRO, with the same moments and a whole fp32 master, holds {whole} bytes in all.
formula  for N ranks: stage 1 2 + 2 + 10/N; stage 2 2 + 2/N + 10/N; stage 3 2/N + 2/N + 10/N.
         At {many} ranks that is {4 + 10 / many:.2f}, {2 + 12 / many:.2f} and {14 / many:.2f} bytes a parameter; DDP stays at 8.
grads    are measured between backward and step.
offload  puts gradients and states into host memory; 2 bytes a parameter stay on the device. (Here both are this host's.)
peak     is the whole process: Python, PyTorch and activations too, and memory that both ranks share, in each."""


# ---- the check


def compare_bits(results: dict[str, Result]) -> str:
    """A line that says that all zerolite runs have the same losses; exits where they do not."""
    zero = {name: [loss.hex() for loss in result["losses"]] for name, result in results.items() if not name.startswith("DDP")}
    first, *others = zero
    for name in others:
        if zero[name] != zero[first]:
            step = next(i for i, (a, b) in enumerate(zip(zero[first], zero[name], strict=True)) if a != b)
            raise SystemExit(
                f"demo: FAILED: expected the same losses at every stage, but from step {step + 1} on '{first}' has "
                f"{zero[first][step]} and '{name}' has {zero[name][step]}."
            )
    count = len(zero[first])
    return f"All {len(zero)} zerolite runs: the {count} losses are equal to the last bit, to the final {zero[first][-1]}."


# ---- the figure


def draw(results: dict[str, Result], path: Path) -> None:
    """Memory at rest by term on the left, loss curves on the right."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 1.2})
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.6), gridspec_kw={"width_ratios": [1.15, 1]})
    draw_memory(left, results)
    draw_losses(right, results)
    count = next(iter(results.values()))["parameters"] / 1e6
    figure.suptitle(f"A GPT-2 of {count:.1f} million parameters on {RANKS} ranks, the same script and data", fontsize=13)
    figure.tight_layout(rect=(0, 0, 1, 0.98), w_pad=3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_memory(axes: Axes, results: dict[str, Result]) -> None:
    """Stacked bars of bytes a parameter: pale what is only computed, hatched what rests on the host."""
    stack(axes, 0, UNSHARDED, 0.4, {})
    for place, result in enumerate(results.values(), 1):
        hatches = {term: "//" for term, home in result["homes"].items() if home == "host"}
        stack(axes, place, {term: each(result, "live", term) for term in TERMS}, 1.0, hatches)
    names = ["mixed\nprecision,\nno ZeRO", *results]
    axes.set_xticks(range(len(names)), [name.replace(", ", ",\n").replace(" + ", "\n+ ") for name in names])
    axes.set_ylabel("bytes a parameter on a rank")
    axes.set_title(f"Memory at rest on {RANKS} ranks, measured (pale: computed)", pad=12)
    colours = [Patch(color=colour, label=term) for term, colour in reversed(TERMS.items())]
    host = Patch(facecolor="0.6", edgecolor="white", hatch="//", label="in host memory")
    axes.legend(handles=[*colours, host], loc="upper right", frameon=False)


def stack(axes: Axes, place: int, heights: dict[str, float], alpha: float, hatches: dict[str, str]) -> None:
    """One bar of the three terms, each with its number, and the total above."""
    bottom = 0.0
    for term, colour in TERMS.items():
        height = heights[term]
        axes.bar(place, height, 0.64, bottom, color=colour, hatch=hatches.get(term), edgecolor="white", alpha=alpha)
        box = {"boxstyle": "round,pad=0.2", "facecolor": colour, "edgecolor": "none"} if term in hatches else None
        axes.text(
            place,
            bottom + height / 2,
            f"{height:.3g}",
            ha="center",
            va="center",
            color="white" if alpha == 1 else "0.25",
            bbox=box,
        )
        bottom += height
    device = sum(height for term, height in heights.items() if term not in hatches)
    total = f"{bottom:.3g}" + (f"\n({device:.3g} on device)" if hatches else "")
    axes.text(place, bottom + 0.15, total, ha="center", va="bottom", fontweight="bold")


def draw_losses(axes: Axes, results: dict[str, Result]) -> None:
    """Loss of every step; the zerolite curves lie on each other, so each is drawn thinner than the one below."""
    widths, colours = (1.2, 7.0, 4.5, 2.6, 1.0), ("#d62728", "#c6dbef", "#9ecae1", "#4292c6", "#08306b")
    for (name, result), width, colour in zip(results.items(), widths, colours, strict=True):
        losses = result["losses"]
        style = {"linewidth": width, "zorder": 4 if name.startswith("DDP") else 3, "solid_joinstyle": "round"}
        axes.plot(range(1, len(losses) + 1), losses, color=colour, label=f"{name}: {losses[-1]:.4f}", **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, mean over ranks")
    axes.set_title("Loss: the zerolite runs are equal to the last bit", pad=12)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, title="run: final loss", alignment="left")


# ---- all of it


def main() -> None:
    """Runs, compares, draws."""
    began = time.perf_counter()
    (OUT / "demo").mkdir(parents=True, exist_ok=True)
    print(f"A small GPT-2 learns the source of Python's standard library: {len(RUNS)} runs of {RANKS} ranks, 2 to 4 minutes.")
    print(f"\n[0/{len(RUNS)}] the text's tokens, once, outside of what is measured", flush=True)
    start("text", [SCRIPT, "--model", "tiny", "--steps", "1", "--out", str(OUT)])
    results = {}
    for number, (name, options) in enumerate(RUNS.items(), 1):
        print(
            f"\n[{number}/{len(RUNS)}] {name:18} torchrun --nproc-per-node {RANKS} examples/train.py {' '.join(options)}",
            flush=True,
        )
        results[name] = train(name, options)
    print(f"\n{table(results)}\n\n{notes()}\n")
    print(compare_bits(results))
    draw(results, OUT / "demo.png")
    sample = results["stage 3"]["sample"].rstrip().replace("\n", "\n  | ")
    print(f"\nWhat the model writes after {STEPS} steps of stage 3:\n  | {sample}")
    minutes, seconds = divmod(round(time.perf_counter() - began), 60)
    print(f"\nFigure: {os.path.relpath(OUT / 'demo.png')}    Time: {minutes} min {seconds} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\ndemo: interrupted") from None
