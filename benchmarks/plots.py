"""The pictures of docs/benchmarks.md, each drawn where there are results for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, read
from benchmarks.targets import disturbed

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974", "#64b5cd")
WORK = {"zerolite": 20.0, "torch": 20.0, "DeepSpeed": 20.0, "read": 4.0}  # operations an element of an Adam update, about


def draw(results: Path, folder: Path) -> list[Path]:
    """Draws what there are results for; returns the paths."""
    try:
        import matplotlib
    except ImportError:
        print("left out: plots, matplotlib is not installed")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    blocks = [[row for row in read(path) if row["benchmark"] == "step"] for path in sorted(results.glob("step-*.jsonl"))]
    steps = [row for block in blocks for row in block]
    calm = [row for block in blocks if not disturbed(block) for row in block]
    kernels = read(results / "update.jsonl") + read(results / "passes.jsonl")
    ahead = [row for row in read(results / "scale.jsonl") if row["kind"] == "forecast" and row["fits"]]
    pictures: list[tuple[str, list[Row], Callable[[Any, list[Row]], None]]] = [
        ("memory-by-term", [r for r in largest_block(steps) if r.get("bytes_a_parameter") is not None], memory),
        ("step-by-part", largest_block(steps), parts),
        ("overhead-against-size", calm if len({r["numel"] for r in calm}) > 1 else [], overhead),
        ("roofline", kernels if any("peak_flops" in row for row in kernels) else [], roofline),
        ("scale", ahead, scale),
    ]
    drawn = []
    for name, rows, picture in pictures:
        if rows:
            figure, axes = pyplot.subplots(figsize=(9, 5.2))
            picture(axes, rows)
            axes.spines[["top", "right"]].set_visible(False)
            figure.tight_layout()
            drawn.append(folder / f"{name}.png")
            figure.savefig(drawn[-1], dpi=110)
            pyplot.close(figure)
    return drawn


def largest_block(rows: list[Row]) -> list[Row]:
    """The rows of the model and world with most systems; where equal, of several ranks, and then the larger model."""
    blocks: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        blocks.setdefault((row["numel"], row["ranks"]), []).append(row)
    return max(blocks.values(), key=lambda block: (len(block), block[0]["ranks"] > 1, block[0]["numel"]), default=[])


def title(rows: list[Row]) -> str:
    ranks = rows[0]["ranks"]
    return f"{rows[0].get('model', 'GPT-2')}, {rows[0]['numel'] / 1e6:.0f} M parameters, {ranks} rank{'s' * (ranks > 1)}"


def stack(axes: Any, series: dict[str, list[float]], height: float) -> None:
    """A horizontal bar for each row, of one part for each series."""
    left = [0.0] * len(next(iter(series.values()), []))
    for (label, each), colour in zip(series.items(), COLOURS * 3, strict=False):
        axes.barh(range(len(each)), each, height, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, each, strict=True)]


def name_bars(axes: Any, rows: list[Row], unit: str) -> None:
    """Systems beside their bars, the first on top."""
    axes.set_yticks(range(len(rows)), [row["system"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title(rows), fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def memory(axes: Any, rows: list[Row]) -> None:
    """Planned bytes at rest by term (zerolite), and what was measured at rest and at the peak (all)."""
    terms = list(dict.fromkeys(term for row in rows for term in (row["plan"] or {})))
    stack(axes, {f"planned: {term}": [(row["plan"] or {}).get(term, 0) / row["numel"] for row in rows] for term in terms}, 0.6)
    axes.plot([row["bytes_a_parameter"] for row in rows], range(len(rows)), "k|", markersize=14, label="measured at rest")
    axes.plot([row["peak_a_parameter"] for row in rows], range(len(rows)), "kx", label="measured peak")
    name_bars(axes, rows, "bytes a parameter and rank, above the process before the model (shared pages once)")


def parts(axes: Any, rows: list[Row]) -> None:
    """Forward, backward and update as bars, communication within them as a thin one below."""
    stack(axes, {phase: [row[phase] * 1e3 for row in rows] for phase in ("forward", "backward", "update")}, 0.5)
    if any("communication" in row for row in rows):
        places = [place + 0.36 for place in range(len(rows))]
        label = "of which communication is under way"
        axes.barh(places, [row.get("communication", 0.0) * 1e3 for row in rows], 0.18, color=COLOURS[7], label=label)
    name_bars(axes, rows, "ms a step, median")


LINES = {  # systems: colour and style
    "DDP + AdamW(fused)": ("#8c8c8c", "s--"),
    "FSDP2": ("#64b5cd", "s--"),
    "DeepSpeed's best": ("#dd8452", "s--"),
    "zerolite 1": ("#9ecae1", "o-"),
    "zerolite 2": ("#4c72b0", "o-"),
    "zerolite 3": ("#c44e52", "o-"),
}


def overhead(axes: Any, rows: list[Row]) -> None:
    """Overhead against the number of parameters, a panel for each world, of the processor with most rows; without the model of
    many small parameters, whose size says nothing."""
    rows = [row for row in rows if row["overhead"] > 0 and row.get("shape", {}).get("kind") != "small"]
    hosts = Counter(row["conditions"]["cpu"] for row in rows).most_common(1)
    host = hosts[0][0] if hosts else ""
    rows = [row for row in rows if row["conditions"]["cpu"] == host]
    worlds, figure = sorted({row["ranks"] for row in rows}), axes.figure
    axes.remove()
    panels = figure.subplots(1, max(len(worlds), 1), sharey=True, squeeze=False)[0]
    for panel, world in zip(panels, worlds, strict=False):
        points: dict[str, dict[float, float]] = {name: {} for name in LINES}
        for row in (row for row in rows if row["ranks"] == world):
            name = "DeepSpeed's best" if row["system"].startswith("DeepSpeed") else row["system"]
            if name in points:
                size, value = row["numel"] / 1e6, row["overhead"] * 1e3
                points[name][size] = min(value, points[name].get(size, value))
        for name, (colour, style) in LINES.items():
            if points[name]:
                panel.plot(*zip(*sorted(points[name].items()), strict=True), style, color=colour, label=name, markersize=5)
        panel.set_xscale("log")
        panel.set_yscale("log")
        sizes = [0.0]
        for size in sorted({size for found in points.values() for size in found}):  # those whose labels have room
            sizes += [size] * (size > 1.5 * sizes[-1])
        panel.set_xticks(sizes[1:], [f"{size:.3g}" for size in sizes[1:]])
        panel.set_title(f"{world} rank{'s' * (world > 1)}", fontsize=10)
        panel.set_xlabel("million parameters")
        panel.spines[["top", "right"]].set_visible(False)
    low, high = panels[0].get_ylim()
    ticks = [n * 10.0**power for power in range(-1, 6) for n in (1, 2, 5) if low <= n * 10.0**power <= high]
    panels[0].set_yticks(ticks, [f"{step:g}" for step in ticks])
    panels[0].set_ylabel("overhead, ms a step")
    for panel in panels:
        panel.minorticks_off()
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(host, fontsize=10)


def roofline(axes: Any, rows: list[Row]) -> None:
    """Operations a second against operations a byte, under the measured ceilings; names beside the points."""
    peak = max(row["peak_flops"] for row in rows if "peak_flops" in row)
    ceilings = [row for row in rows if row["side"].startswith("ceiling")]
    points = []
    for row in (row for row in rows if not row["side"].startswith("ceiling")):
        work = row.get("flops", WORK.get(row["side"].split()[0].split("-")[0].rstrip(","), 20.0))
        if work:
            points.append((work / row["bytes"], work / row["ns"][1], row["side"]))
    left, right = min(x for x, _, _ in points) / 1.5, max(x for x, _, _ in points) * 12
    for row, style in zip(ceilings, ("-", "--", ":"), strict=False):
        speed = row["bytes"] / row["ns"][1] * 1e9
        label = f"{row['side']}, {speed / 1e9:.0f} GB/s"
        xs = (left, right / 5.5)  # names begin to the right
        axes.plot(xs, [min(peak, x * speed) / 1e9 for x in xs], style, color="0.6", label=label)
    top = 0.0
    for x, y, side in sorted(points, key=lambda point: point[1]):
        ours = side.startswith(("zerolite", "pack", "average", "square"))
        axes.plot(x, y, "o" if ours else "s", color=COLOURS[0] if ours else COLOURS[1], markersize=6)
        top = max(top * 1.16, y)  # names, from below, with room between them
        line = {"arrowstyle": "-", "color": "0.8", "lw": 0.6}
        axes.annotate(side, (x, y), (right / 4, top), fontsize=7, va="center", arrowprops=line)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_xlabel("operations a byte (about 20 an element of an Adam update)")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"circles: zerolite, squares: others; {rows[0]['conditions']['cpu']}", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def scale(axes: Any, rows: list[Row]) -> None:
    """Forecast: tokens a second and rank, between no overlap and full overlap."""
    for name, colour in zip(dict.fromkeys(row["model"] for row in rows), COLOURS, strict=False):
        mine = [row for row in rows if row["model"] == name]
        worlds = [row["ranks"] for row in mine]
        low, high = ([row["tokens"] / row[kind] for row in mine] for kind in ("serial", "overlapped"))
        axes.fill_between(worlds, low, high, color=colour, alpha=0.3, label=name)
        axes.plot(worlds, low, color=colour, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("ranks")
    axes.set_ylabel("tokens a second and rank, no overlap to full overlap")
    axes.set_title(f"Forecast, not measured: {rows[0]['hardware']}", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
