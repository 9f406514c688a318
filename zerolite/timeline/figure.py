"""The timeline as a PNG: live bytes stacked by term, phases, and the memory of the process. Needs matplotlib."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from zerolite.memory import NAMES
from zerolite.timeline.peak import Peak
from zerolite.timeline.record import (
    PHASE_COLOURS,
    PHASES,
    TERM_COLOURS,
    TERMS,
    Recording,
    Sample,
    amount,
    short,
    stretches,
    thin,
)

_MIB = 2**20
_MOST = 4000  # samples that are drawn
_ROWS = 14  # buckets that are drawn, the largest


def draw(record: Recording, peak: Peak, path: Path) -> None:
    """Writes the figure. It changes nothing of matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    most = record.most()
    largest = sorted(most, key=lambda name: -most[name])[:_ROWS]
    names = [name for name in record.buckets if name in largest]
    rows = 0.17 * len(names) + 0.1
    lines = [peak.text, *(f"To hold less: {cure}" for cure in peak.cures[:2])]
    wrapped = [line for text in lines for line in textwrap.wrap(text, 172)]
    below_axes = 0.65 + 0.16 * max(len(wrapped), 7)  # inches
    height = 5.65 + below_axes + rows
    figure = Figure(figsize=(12.5, height), dpi=100)
    FigureCanvasAgg(figure)
    edges = {"left": 0.125, "right": 0.79, "top": 1 - 0.78 / height, "bottom": below_axes / height}
    grid = figure.add_gridspec(4, 1, height_ratios=[0.2, 3.3, 1.1, rows], hspace=0.12, **edges)
    strip = figure.add_subplot(grid[0])
    main, below, last = (figure.add_subplot(grid[k], sharex=strip) for k in (1, 2, 3))
    samples = thin(record.samples, _MOST)
    _strip(strip, samples)
    _terms(main, record, samples, peak.sample)
    _process(below, record.samples)
    _buckets(last, record, samples, names)
    for axes in (strip, main, below):
        axes.tick_params(labelbottom=False)
    known = record.conditions
    figure.suptitle(
        f"Memory of rank {known['rank']}: ZeRO stage {known['stage']}, {known['parameters']} parameters in "
        f"{known['compute dtype']}, {known['moments']} moments, bucket_mb={known['bucket_mb']}",
        x=0.05,
        y=1 - 0.25 / height,
        ha="left",
        fontsize=12.5,
    )
    figure.text(0.05, (below_axes - 0.57) / height, "\n".join(wrapped), va="top", ha="left", fontsize=8.5, color="0.2")
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a $ in a module's name is a $
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """With a palette: a third of the bytes, and nothing that the eye would miss."""
    from PIL import Image  # matplotlib depends on it

    canvas = figure.canvas
    canvas.draw()
    picture = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(256).save(path, optimize=True)


def _strip(axes: Any, samples: list[Sample]) -> None:
    """What the time was spent on."""
    from matplotlib.patches import Patch

    found = stretches(samples)
    for phase in PHASES:
        spans = [(start, stop - start) for start, stop, name in found if name == phase]
        axes.broken_barh(spans, (0, 1), color=PHASE_COLOURS[phase], linewidth=0)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.set_xlim(samples[0].seconds, max(samples[-1].seconds, samples[0].seconds + 1e-6))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    shown = [phase for phase in PHASES if any(name == phase for _, _, name in found)]
    handles = [Patch(color=PHASE_COLOURS[phase], label="between" if phase == "other" else phase) for phase in shown]
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(handles), frameon=False, fontsize=8.5,
        handlelength=1.0, columnspacing=1.2, borderpad=0.1,
    )  # fmt: skip


def _terms(axes: Any, record: Recording, samples: list[Sample], peak: Sample) -> None:
    seconds = [sample.seconds for sample in samples]
    base = [0.0] * len(samples)
    for number, term in enumerate(TERMS):
        values = [sample.terms[number] / _MIB for sample in samples]
        if not any(values):
            continue  # nor in the legend
        top = [low + value for low, value in zip(base, values, strict=True)]
        axes.fill_between(seconds, base, top, step="post", color=TERM_COLOURS[term], linewidth=0, label=NAMES[term])
        slim = [
            k for k in range(len(seconds) - 1) if values[k] and seconds[k + 1] - seconds[k] < (seconds[-1] - seconds[0]) / 900
        ]
        if slim:  # narrower than a pixel, and peaks often are
            at = [seconds[k] for k in slim], [base[k] for k in slim], [top[k] for k in slim]
            axes.vlines(*at, color=TERM_COLOURS[term], linewidth=0.9)
        base = top
    axes.axhline(record.rest / _MIB, color="0.15", linestyle="--", linewidth=1.2, label="planned at rest")
    axes.plot([peak.seconds], [peak.live / _MIB], "o", color="black", markersize=5, zorder=5)
    right = peak.seconds > (seconds[0] + seconds[-1]) / 2
    axes.annotate(
        f"peak {amount(peak.live)}: {short(peak.label, 60)}",
        (peak.seconds, peak.live / _MIB),
        xytext=(-12 if right else 12, 14),
        textcoords="offset points",
        ha="right" if right else "left",
        va="bottom",
        fontsize=9.5,
        arrowprops={"arrowstyle": "-", "color": "0.3"},
    )
    axes.set_ylim(0, max(peak.live, record.rest) / _MIB * 1.17)
    axes.set_ylabel("live tensors, MiB")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9.5)


def _process(axes: Any, samples: list[Sample]) -> None:
    """The process: its own axis, since Python, PyTorch and activations are in it too."""
    rows = {
        "resident": ("process, resident", {"color": "#333333", "linewidth": 1.3}),
        "proportional": ("process, its part\nof what it shares", {"color": "#d62728", "marker": ".", "linewidth": 0.8}),
        "allocated": ("device, allocated", {"color": "#1f77b4", "linewidth": 1.3}),
        "reserved": ("device, reserved", {"color": "#9467bd", "linewidth": 1.3, "linestyle": ":"}),
    }
    for name, (label, style) in rows.items():
        points = [(s.seconds, getattr(s.process, name) / _MIB) for s in samples if getattr(s.process, name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_ylabel("process, MiB")
    axes.margins(y=0.12)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9.5)


def _buckets(axes: Any, record: Recording, samples: list[Sample], names: list[str]) -> None:
    """A row for each bucket: what it holds beyond its least."""
    seconds = [sample.seconds for sample in samples]
    most = record.most()
    for row, name in enumerate(names):
        place = record.buckets.index(name)
        held = [sample.buckets[place] if place < len(sample.buckets) else 0 for sample in samples]
        least = min(held)
        tops = [row + 1 - 0.82 * (value - least) / max(most[name] - least, 1) for value in held]
        axes.fill_between(seconds, row + 1, tops, step="post", color="#7a93bd", linewidth=0)
        text = f"{amount(least)} to {amount(most[name])}"
        axes.text(1.012, row + 0.6, text, transform=axes.get_yaxis_transform(), fontsize=8.5, va="center")
    axes.set_ylim(len(names), 0)
    shown = [short(name, 20) for name in names]
    axes.set_yticks([row + 0.6 for row in range(len(names))], shown, fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("seconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
