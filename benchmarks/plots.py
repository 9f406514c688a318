"""The pictures of docs/benchmarks.md, each drawn where there are results for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, read

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

    steps = [row for path in sorted(results.glob("step-*.jsonl")) for row in read(path) if row["benchmark"] == "step"]
    kernels = read(results / "update.jsonl") + read(results / "passes.jsonl")
    ahead = [row for row in read(results / "scale.jsonl") if row["kind"] == "forecast" and row["fits"]]
    pictures: list[tuple[str, list[Row], Callable[[Any, list[Row]], None]]] = [
        ("memory-by-term", [r for r in largest_block(steps) if r.get("bytes_a_parameter") is not None], memory),
        ("step-by-part", largest_block(steps), parts),
        ("overhead-against-size", steps if len({r["numel"] for r in steps}) > 1 else [], overhead),
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


SHOWN = ("DDP + AdamW(fused)", "ZeroRedundancyOptimizer", "FSDP2", *(f"DeepSpeed {k}" for k in (1, 2, 3)))
SHOWN += tuple(f"zerolite {k}" for k in (1, 2, 3))


def overhead(axes: Any, rows: list[Row]) -> None:
    """Overhead against the number of parameters, a panel for each world and a line for each processor; without variants, which
    would hide the lines, and without the model of many small parameters, whose size says nothing."""
    rows = [row for row in rows if row["system"] in SHOWN and row["overhead"] > 0]
    rows = [row for row in rows if row.get("shape", {}).get("kind") != "small"]
    hosts = [cpu for cpu, _ in Counter(row["conditions"]["cpu"] for row in rows).most_common()]
    worlds, figure = sorted({row["ranks"] for row in rows}), axes.figure
    axes.remove()
    panels = figure.subplots(1, max(len(worlds), 1), sharey=True, squeeze=False)[0]
    for panel, world in zip(panels, worlds, strict=False):
        here = sorted((row for row in rows if row["ranks"] == world), key=lambda row: row["numel"])
        for name, colour in zip(SHOWN, COLOURS, strict=False):
            style = "o-" if name.startswith("zerolite") else "s--"
            for host, fill in zip(hosts, (colour, "white", "black"), strict=False):
                mine = [row for row in here if row["system"] == name and row["conditions"]["cpu"] == host]
                points = [(row["numel"] / 1e6, row["overhead"] * 1e3) for row in mine]
                if points:
                    xy = zip(*points, strict=True)
                    panel.plot(*xy, style, color=colour, label=name, markersize=4, markerfacecolor=fill)
        panel.set_xscale("log")
        panel.set_yscale("log")
        sizes = [0.0]
        for row in here:  # those whose labels have room
            sizes += [row["numel"] / 1e6] * (row["numel"] / 1e6 > 1.25 * sizes[-1])
        sizes.pop(0)
        panel.set_xticks(sizes, [f"{size:.3g}" for size in sizes], rotation=60, fontsize=8)
        panel.set_title(f"{world} rank{'s' * (world > 1)}", fontsize=10)
        panel.set_xlabel("million parameters")
        panel.spines[["top", "right"]].set_visible(False)
    low, high = panels[0].get_ylim()
    steps = [n * 10.0**power for power in range(-1, 6) for n in (1, 2, 5)]
    ticks = [step for step in steps if low <= step <= high]
    panels[0].set_yticks(ticks, [f"{step:g}" for step in ticks])
    panels[0].set_ylabel("overhead, ms a step")
    for panel in panels:
        panel.minorticks_off()
    named: dict[str, Any] = {}  # a world may lack a system
    for panel in panels:
        for line, name in zip(*panel.get_legend_handles_labels(), strict=True):
            named.setdefault(name, line)
    for host, fill in zip(hosts if len(hosts) > 1 else [], ("gray", "white", "black"), strict=False):
        named[host] = panels[-1].plot([], [], "o", color="gray", markersize=4, markerfacecolor=fill)[0]
    panels[-1].legend(named.values(), named, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def roofline(axes: Any, rows: list[Row]) -> None:
    """Operations a second against operations a byte, under the measured ceilings."""
    peak = max(row["peak_flops"] for row in rows if "peak_flops" in row)
    ceilings = [row for row in rows if row["side"].startswith("ceiling")]
    xs = [2.0**k for k in range(-6, 9)]
    for row, style in zip(ceilings, ("-", "--", ":"), strict=False):
        speed = row["bytes"] / row["ns"][1] * 1e9
        axes.plot(
            xs, [min(peak, x * speed) / 1e9 for x in xs], style, color="0.4", label=f"{row['side']}, {speed / 1e9:.0f} GB/s"
        )
    colours = {mark: iter(COLOURS * 2) for mark in "os"}
    for row in (row for row in rows if not row["side"].startswith("ceiling")):
        work = row.get("flops", WORK.get(row["side"].split()[0].split("-")[0].rstrip(","), 20.0))
        if work:
            x, y = work / row["bytes"], work / row["ns"][1]
            mark = "o" if row["side"].startswith(("zerolite", "pack", "average", "square")) else "s"
            axes.plot(x, y, mark, color=next(colours[mark]), label=row["side"], markersize=6)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte (about 20 an element of an Adam update)")
    axes.set_ylabel("GFLOP/s")
    axes.legend(frameon=False, fontsize=6, ncols=2)


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
