"""The timeline as one HTML page: figures as inline SVG that need no script, and a script that adds values and toggles."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from string import Template

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
from zerolite.timeline.script import SCRIPT, STYLE

_MOST = 1200  # samples that are drawn
_ROWS = 80  # buckets that are drawn, the largest
LEFT, RIGHT, TOP, WIDTH, HEIGHT, ROW = 170, 130, 22, 1024, 330, 22  # of all figures, in pixels: one time is at one place

_PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Memory timeline</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>$style</style></head><body>
<h1>Memory timeline</h1>
<div class="peak">$peak</div>$cures
<h2>Live tensors by term</h2>
<div id="toggles">$terms</div>
<div class="wide">$figure</div>
<p class="note">Time runs from left to right, $seconds; the bar on top shows the phase: $phases. The dashed line is what the
plan rests at. Activations and what else the program holds are no part of these terms; the memory of the process is below.
<span class="hint">Point at a figure for values; in the first the arrow keys go from event to event, P to the peak.</span></p>
<h2>Memory of the process</h2>
$process
<h2>What each bucket holds when</h2>
<div class="wide">$rows</div>
<p class="note">Each row shows what it holds beyond its least, up to its most; both stand on the right.$left_out</p>
<h2>At the peak, by bucket</h2>
$table
<h2>By term</h2>
$by_term
<h2>Conditions</h2>
$conditions
<div id="tip" hidden></div>
<script type="application/json" id="data">$data</script>
<script>$script</script>
</body></html>
""")


def page(record: Recording, peak: Peak) -> str:
    """The whole page, self-contained."""
    samples = thin(record.samples, _MOST)
    most = record.most()
    names = sorted(most, key=lambda name: -most[name])[:_ROWS]
    names = [name for name in record.buckets if name in set(names)]
    spent = record.samples[-1].seconds - record.samples[0].seconds
    cures = "".join(f"<li>{escape(cure)}</li>" for cure in peak.cures)
    kept = f"{len(record.samples):,} samples" + (
        f", and {record.dropped:,} after the limit, not shown" if record.dropped else ""
    )
    shown = [phase for phase in PHASES if any(sample.work == phase for sample in samples[1:])]
    conditions = {
        **record.conditions,
        "recorded": f"{kept}, {record.seconds_recording:.2f} s of recording left out of the times",
    }
    return _PAGE.substitute(
        style=STYLE,
        script=SCRIPT,
        peak="".join(f"<p>{escape(line)}</p>" for line in peak.lines),
        cures=f"<p>What would lower it:</p><ul>{cures}</ul>" if cures else "",
        terms=" ".join(
            f'<label><input type="checkbox" data-term="{k}" checked><i style="background:{TERM_COLOURS[term]}"></i>'
            f"{NAMES[term]}</label>"
            for k, term in enumerate(TERMS)
            if any(sample.terms[k] for sample in samples)
        ),
        phases=", ".join(f'<span><i style="background:{PHASE_COLOURS[phase]}"></i>{_called(phase)}</span>' for phase in shown),
        figure=_figure(record, samples, peak.sample),
        process=_process(record.samples),
        seconds=f"{spent:,.2f} s" if spent >= 1 else f"{spent * 1e3:.3g} ms",
        rows=_rows(record, samples, names, most),
        left_out=f" The {len(most) - len(names)} smallest are left out." if len(most) > len(names) else "",
        table=_bucket_table(record, most),
        by_term=_term_table(record, peak.sample),
        conditions=_table(["", ""], [[name, str(value)] for name, value in conditions.items()], "pairs"),
        data=json.dumps(_data(record, samples, names, peak.sample), separators=(",", ":")).replace("<", "\\u003c"),
    )


def _called(phase: str) -> str:
    return "between" if phase == "other" else phase


def _tick(number: float) -> str:
    """A number of an axis: round, so without zeros behind the point."""
    return amount(number).replace(".00 ", " ").replace(".0 ", " ")


def _data(record: Recording, samples: list[Sample], names: list[str], peak: Sample) -> dict[str, object]:
    """What the script draws from."""
    places = [record.buckets.index(name) for name in names]
    return {
        "terms": [NAMES[term] for term in TERMS],
        "colours": [TERM_COLOURS[term] for term in TERMS],
        "high": _high(record, peak),
        "buckets": names,
        "box": {"left": LEFT, "right": RIGHT, "top": TOP, "width": WIDTH, "height": HEIGHT, "row": ROW},
        "seconds": [round(sample.seconds, 6) for sample in samples],
        "labels": [f"{_called(sample.phase)}: {sample.label}" for sample in samples],
        "peak": next((k for k, sample in enumerate(samples) if sample is peak), None),
        "live": [sample.terms for sample in samples],
        "held": [_changes([sample.buckets[k] if k < len(sample.buckets) else 0 for sample in samples]) for k in places],
        "resident": [sample.process.resident for sample in samples],
        "allocated": [sample.process.allocated for sample in samples],
    }


def _changes(values: Sequence[float]) -> list[tuple[int, float]]:
    """(place, value) where a value differs from the one before: most buckets rest most of the time."""
    return [(k, value) for k, value in enumerate(values) if not k or value != values[k - 1]]


# ---- figures


class _Scale:
    """From seconds and bytes to pixels of a box."""

    def __init__(self, first: float, last: float, low: float, high: float, top: float, bottom: float) -> None:
        self.first, self.length = first, max(last - first, 1e-9)
        self.low, self.span = low, max(high - low, 1e-9)
        self.top, self.bottom = top, bottom

    def x(self, seconds: float) -> float:
        return LEFT + (seconds - self.first) / self.length * (WIDTH - LEFT - RIGHT)

    def y(self, number: float) -> float:
        return self.bottom - (number - self.low) / self.span * (self.bottom - self.top)

    def steps(self, samples: Sequence[Sample], values: Sequence[float]) -> list[str]:
        """Points of a line that keeps each value until the next; none within a level stretch."""
        points: list[str] = []
        for k, value in _changes(values):
            x = f"{self.x(samples[k].seconds):.1f}"
            points += [f"{x},{self.y(values[k - 1]):.1f}"] if k else []
            points.append(f"{x},{self.y(value):.1f}")
        return [*points, f"{self.x(samples[-1].seconds):.1f},{self.y(values[-1]):.1f}"]


def ticks(low: float, high: float) -> list[int]:
    """About five round numbers of bytes between two."""
    step = 2.0**10
    while (high - low) / step > 6:
        step *= 2
    if high - low < step:
        step = max((high - low) / 4, 1)
    first = -(-low // step)
    return [int((first + k) * step) for k in range(8) if (first + k) * step <= high]


def _axis(scale: _Scale, low: float, high: float) -> str:
    return "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{scale.y(value):.1f}" y2="{scale.y(value):.1f}" class="grid"/>'
        f'<text x="{LEFT - 8}" y="{scale.y(value) + 4:.1f}" text-anchor="end">{_tick(value)}</text>'
        for value in ticks(low, high)
    )


def _seconds(scale: _Scale) -> str:
    """Numbers below the figure, ten at most."""
    unit, factor = ("ms", 1e3) if scale.length < 0.1 else ("s", 1.0)
    length = scale.length * factor
    power = 10.0 ** math.floor(math.log10(length))
    step = next(power * k for k in (0.1, 0.2, 0.5, 1, 2) if length / (power * k) <= 10)
    return "".join(
        f'<text x="{scale.x(scale.first + k * step / factor):.1f}" y="{HEIGHT + 17}" text-anchor="middle">'
        f"{k * step:g} {unit}</text>"
        for k in range(int(length / step) + 1)
    )


def _high(record: Recording, peak: Sample) -> float:
    """The upper end of the figure."""
    return max(peak.live, record.rest, 1) * 1.12


def _figure(record: Recording, samples: list[Sample], peak: Sample) -> str:
    high = _high(record, peak)
    scale = _Scale(samples[0].seconds, samples[-1].seconds, 0, high, TOP, HEIGHT)
    base = [0] * len(samples)
    areas = []
    for number, term in enumerate(TERMS):
        top = [low + sample.terms[number] for low, sample in zip(base, samples, strict=True)]
        points = " ".join(scale.steps(samples, top) + scale.steps(samples, base)[::-1])
        areas.append(f'<polygon data-term="{number}" fill="{TERM_COLOURS[term]}" points="{points}"/>')
        base = top
    bands = "".join(
        f'<rect x="{scale.x(start):.2f}" y="4" width="{max(scale.x(stop) - scale.x(start), 0.3):.2f}" height="12" '
        f'fill="{PHASE_COLOURS[phase]}"><title>{phase}</title></rect>'
        for start, stop, phase in stretches(samples)
    )
    x, y = scale.x(peak.seconds), scale.y(peak.live)
    side = ("end", -8) if x > WIDTH / 2 else ("start", 8)
    rest = scale.y(record.rest)
    return (
        f'<svg id="figure" viewBox="0 0 {WIDTH} {HEIGHT + 24}" role="img" tabindex="0" '
        f'aria-label="live bytes by term over time">'
        f'{bands}<g id="axis">{_axis(scale, 0, high)}</g>{"".join(areas)}'
        f'<g id="rest" transform="translate(0,{rest:.1f})"><line x1="{LEFT}" x2="{WIDTH - RIGHT}" class="rest"/>'
        f'<text x="{WIDTH - RIGHT + 5}" y="4" class="small">plan {amount(record.rest)}</text></g>'
        f'<g id="peak"><circle cx="{x:.1f}" cy="{y:.1f}" r="4"/><text x="{x + side[1]:.1f}" y="{y - 8:.1f}" '
        f'text-anchor="{side[0]}">peak {amount(peak.live)}: {escape(short(peak.label, 70))}</text></g>{_seconds(scale)}'
        f'<line y1="{TOP}" y2="{HEIGHT}" class="cross" visibility="hidden"/></svg>'
    )


def _process(samples: list[Sample]) -> str:
    """Lines of what is known of the process."""
    kinds = {"resident": "currentColor", "proportional": "#d62728", "allocated": "#1f77b4", "reserved": "#9467bd"}
    titles = {
        "resident": "resident",
        "proportional": "its part of what it shares",
        "allocated": "allocated on the device",
        "reserved": "reserved on the device",
    }
    found = {
        kind: [(sample, value) for sample in samples if (value := getattr(sample.process, kind)) is not None] for kind in kinds
    }
    values = [value for rows in found.values() for _, value in rows]
    if not values:
        return "<p>Not known on this system.</p>"
    margin = max((max(values) - min(values)) * 0.1, 2**20)
    low, high = max(min(values) - margin, 0), max(values) + margin
    scale = _Scale(samples[0].seconds, samples[-1].seconds, low, high, 8, 130)
    lines, legend = "", []
    for kind, rows in found.items():
        if rows:
            some = thin([sample for sample, _ in rows], _MOST)
            points = scale.steps(some, [getattr(sample.process, kind) for sample in some])
            lines += f'<polyline fill="none" stroke="{kinds[kind]}" stroke-width="1.5" points="{" ".join(points)}"/>'
            legend.append(f'<span><i style="background:{kinds[kind]}"></i>{titles[kind]}</span>')
    return (
        f'<div class="wide"><svg viewBox="0 0 {WIDTH} 140" role="img" aria-label="memory of the process over time">'
        f'{_axis(scale, low, high)}{lines}<line y1="8" y2="130" class="cross" visibility="hidden"/></svg></div>'
        f'<p class="note">{", ".join(legend)}. '
        "Python, PyTorch and activations are in it.</p>"
    )


def _rows(record: Recording, samples: list[Sample], names: list[str], most: dict[str, int]) -> str:
    """One filled line for each bucket, in the order of the forward pass."""
    parts = []
    for row, name in enumerate(names):
        place, top = record.buckets.index(name), row * ROW + 2
        held = [sample.buckets[place] if place < len(sample.buckets) else 0 for sample in samples]
        least = min(held)
        scale = _Scale(samples[0].seconds, samples[-1].seconds, least, max(most[name], least + 1), top, top + ROW - 4)
        points = [*scale.steps(samples, held), f"{scale.x(samples[-1].seconds):.1f},{scale.bottom}", f"{LEFT},{scale.bottom}"]
        held_text = f"{amount(least)} to {amount(most[name])}" if most[name] > least else amount(least)
        parts.append(
            f'<polygon fill="#7a93bd" points="{" ".join(points)}"/>'
            f'<text x="{LEFT - 6}" y="{top + ROW - 6}" text-anchor="end" class="small">{escape(short(name, 26))}</text>'
            f'<text x="{WIDTH - RIGHT + 5}" y="{top + ROW - 6}" class="small">{held_text}</text>'
        )
    height = len(names) * ROW + 4
    return (
        f'<svg id="rows" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="bytes by bucket over time">'
        f'{"".join(parts)}<line y1="0" y2="{height}" class="cross" visibility="hidden"/></svg>'
    )


# ---- tables


def _table(head: list[str], rows: list[list[str]], kind: str = "numbers") -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{kind}">' + f"{f'<tr>{top}</tr>' if any(head) else ''}{body}</table>"


def _bucket_table(record: Recording, most: dict[str, int]) -> str:
    columns = [term for term in TERMS if any(held.get(term) for held in record.at_peak.values())]
    rows = [
        [name, *(amount(held[term]) if held[term] else "" for term in columns), amount(sum(held.values())), amount(most[name])]
        for name, held in record.at_peak.items()
    ]
    sums = [amount(sum(held[term] for held in record.at_peak.values())) for term in columns]
    total = amount(sum(sum(held.values()) for held in record.at_peak.values()))
    return _table(
        ["bucket", *(NAMES[term] for term in columns), "at the peak", "most ever"], [*rows, ["sum", *sums, total, ""]]
    )


def _term_table(record: Recording, peak: Sample) -> str:
    rows = [
        [
            NAMES[term],
            f"{record.planned[term]:,}",
            f"{peak.terms[k]:,}",
            f"{max(sample.terms[k] for sample in [peak, *record.samples]):,}",
        ]
        for k, term in enumerate(TERMS)
    ]
    rows.append(["sum", f"{record.rest:,}", f"{peak.live:,}", ""])
    return _table(["bytes", "planned at rest", "at the peak", "most ever"], rows)
