"""A page that compares two result files (or folders of them): one self-contained HTML file.

zerolite bench compare OLD.jsonl NEW.jsonl [-o compare.html]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from benchmarks.harness import Row, quantile, read, shown

#: What is compared of each benchmark: where it is in a row, what it is called, its scale; less is better but for "*".
METRICS: dict[str, list[tuple[str, str, float]]] = {
    "step": [
        ("step", "step, ms", 1e3),
        ("overhead", "overhead, ms", 1e3),
        ("forward", "forward, ms", 1e3),
        ("backward", "backward, ms", 1e3),
        ("update", "update, ms", 1e3),
        ("communication", "communication, ms", 1e3),
        ("first", "first step, ms", 1e3),
        ("tokens_a_second", "tokens a second *", 1.0),
        ("peak", "peak, MiB, all ranks", 2.0**-20),
        ("rest", "at rest, MiB, all ranks", 2.0**-20),
        ("bytes_a_parameter", "bytes a parameter", 1.0),
        ("wire", "on the wire, MB", 1e-6),
        ("loss", "final loss", 1.0),
    ],
    "update": [("ns", "ns a parameter", 1.0)],
    "passes": [("ns", "ns an element", 1.0)],
    "exchange": [("ms", "ms", 1.0)],
    "small": [("ratio", "10,000 parameters to 10", 1.0)],
    "footprint": [("ratio", "process to plan", 1.0)],
    "largest": [("numel", "largest model, M parameters *", 1e-6)],
    "construct": [("seconds", "ms a rank", 1e3)],
    "moments": [("end", "loss at the end", 1.0)],
    "device": [("seconds", "s", 1.0)],
    "scale": [("serial", "forecast step, s", 1.0)],
}
NAMES = ["model", "ranks", "numel", "system", "side", "part", "name", "stage", "moments", "seed", "limit", "checkpoint", "clip"]
NAMES += ["device", "tokens", "hardware", "known"]

_PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; --text: #222; --dim: #666; --back: #fff; --line: #f4f4f4; --less: #1a7f37; --more: #b3261e }
@media (prefers-color-scheme: dark) { :root { --text: #ddd; --dim: #a0a0a0; --back: #181818; --line: #232323; --less: #57c878;
--more: #ff8a80 } }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 112em; padding: 0 1em; color: var(--text);
background: var(--back); overflow-wrap: anywhere }
a { color: inherit } .tables { display: flex; flex-wrap: wrap; gap: 0 3em } .tables > div { max-width: 100%; overflow-x: auto }
table { border-collapse: collapse; margin: .6em 0 1.6em } th, td { padding: .2em .7em; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9em; max-width: 26em }
.text td, .text th { text-align: left; white-space: normal; vertical-align: top } .text td:first-child { min-width: 5em }
tr:nth-child(even) { background: var(--line) } h2 { margin-bottom: .2em } summary { cursor: pointer }
.better { color: var(--less) } .worse { color: var(--more) } .same, .note { color: var(--dim) } svg { vertical-align: middle }
</style></head><body><h1>$title</h1>
<p class="note">A is $a, B is $b. B / A below 1 is less in B; * where more is better. Green is better and red is worse in B,
by more than $band %; of the bars the upper, grey one is A and the lower, blue one is B. Of quantiles the median is compared.
Two files of one machine can be compared in absolute terms; of others, look at ratios within each.</p>
$conditions
$overview
$sections
$only
</body></html>
""")
BAND = 5.0  # per cent: what differs by less is told in grey
Found = tuple[str, float | None, float | None]  # a name, its value in A and in B


def key(row: Row) -> tuple[str, ...]:
    """What a row is about: rows of two files with the same key are compared. What is measured is no part of it."""
    kind = row["kind"] if "kind" in row else row["benchmark"]
    measured = {name for name, *_ in METRICS.get(row["benchmark"], [])}
    return (
        row["benchmark"],
        kind,
        *(f"{name} {row[name]}" for name in NAMES if row.get(name) is not None and name not in measured),
    )


def heading(row: Row) -> str:
    """The section that a row is in. A forecast's ranks are what its rows differ in."""
    where = f", {row['model']}" if "model" in row else ""
    where += ", activation checkpointing" * row.get("checkpoint", False) + ", clipping" * row.get("clip", False)
    return f"{row['benchmark']}{where}" + (f", {row['ranks']} ranks" if "ranks" in row and row["benchmark"] != "scale" else "")


def label(row: Row) -> str:
    """The row's name within its section."""
    name = str(row.get("system", row.get("side", "")))
    above = {"model", "numel", *(["ranks"] if row["benchmark"] != "scale" else [])}
    return name or ", ".join(f"{name} {row[name]}" for name in NAMES if row.get(name) is not None and name not in above)


def value(row: Row, name: str) -> float | None:
    """A metric of a row; of quantiles the median."""
    found = row.get(name)
    if isinstance(found, list):
        found = quantile([float(x) for x in found], 0.5) if found else None
    return float(found) if isinstance(found, (int, float)) and found >= 0 else None


def page(a: list[Row], b: list[Row], names: tuple[str, str]) -> str:
    """The page. Raises ValueError where the files have nothing in common."""
    left, right = ({key(row): row for row in rows if measures(row)} for rows in (a, b))
    both = [name for name in left if name in right]
    if not both:
        raise ValueError("compare: expected two files with a benchmark, model and system in common, got none")
    sections: dict[str, list[tuple[Row, Row]]] = {}
    for name in both:
        sections.setdefault(heading(left[name]), []).append((left[name], right[name]))
    found = {title: comparisons(pairs) for title, pairs in sections.items()}
    only = [told for rows, other, side in ((left, right, "A"), (right, left, "B")) for told in only_in(rows, other, side)]
    for rows, side in ((a, "A"), (b, "B")):
        away = [row for row in rows if row["benchmark"] in ("skipped", "failed")]
        only += [f"<li>left out of {side}: {escape(row['system'])}: {escape(str(row['why']))}</li>" for row in away]
    return _PAGE.substitute(
        title="Benchmarks compared",
        a=f"<b>{escape(names[0])}</b>",
        b=f"<b>{escape(names[1])}</b>",
        band=f"{BAND:g}",
        conditions=conditions(a, b),
        overview=overview(found),
        sections="\n".join(section(number, title, tables) for number, (title, tables) in enumerate(found.items())),
        only="<h2>Not in both</h2><ul>" + "".join(only) + "</ul>" if only else "",
    )


def measures(row: Row) -> bool:
    """Whether a row has anything that is compared."""
    return any(value(row, name) is not None for name, *_ in METRICS.get(row["benchmark"], []))


def only_in(rows: dict[tuple[str, ...], Row], other: dict[tuple[str, ...], Row], side: str) -> Iterable[str]:
    """One line for each section, with the names of its rows."""
    groups: dict[str, list[str]] = {}
    for name, row in rows.items():
        if name not in other:
            groups.setdefault(heading(row), []).append(label(row))
    for title, labels in groups.items():
        yield f"<li>only in {side}: <b>{escape(title)}</b>: {escape('; '.join(labels))}</li>"


def conditions(a: list[Row], b: list[Row]) -> str:
    """Hardware, versions, commits and commands of both, differing lines in bold; of several rows every value once."""
    lines = []
    both = [[row["conditions"] for row in rows if row.get("conditions")] for rows in (a, b)]
    for name in dict.fromkeys(name for side in both for each in side for name in each):
        values = ["; ".join(dict.fromkeys(told(name, each.get(name)) for each in side)) for side in both]
        tag = "td" if values[0] == values[1] else "th"
        lines.append(f"<tr><td>{escape(name)}</td>" + "".join(f"<{tag}>{escape(v)}</{tag}>" for v in values) + "</tr>")
    return f'<table class="text"><tr><th></th><th>A</th><th>B</th></tr>{"".join(lines)}</table>'


def told(name: str, found: Any) -> str:
    """One condition as text."""
    if name == "versions":
        return ", ".join(f"{k} {v}" for k, v in (found or {}).items() if v)
    if name == "memory" and found:
        return f"{found / 2**30:.1f} GiB"
    return "none" if found is None else str(found)


def comparisons(pairs: list[tuple[Row, Row]]) -> dict[str, list[Found]]:
    """Of each metric that a side has: the rows and their values."""
    tables: dict[str, list[Found]] = {}
    for name, text, factor in METRICS[pairs[0][0]["benchmark"]]:
        for a, b in pairs:
            x, y = (None if found is None else found * factor for found in (value(a, name), value(b, name)))
            if x is not None or y is not None:
                tables.setdefault(text, []).append((label(a), x, y))
    return tables


def overview(found: dict[str, dict[str, list[Found]]]) -> str:
    """How much is better and worse, by section."""
    lines = []
    for number, (title, tables) in enumerate(found.items()):
        kinds = [judged(a, b, "*" in text)[0] for text, rows in tables.items() for _, a, b in rows]
        cells = "".join(f'<td class="{kind}">{kinds.count(kind) or ""}</td>' for kind in ("better", "worse", "same"))
        lines.append(f'<tr><td><a href="#s{number}">{escape(title)}</a></td>{cells}</tr>')
    return f"<table><tr><th>figures of</th><th>better</th><th>worse</th><th>within {BAND:g} %</th></tr>{''.join(lines)}</table>"


def section(number: int, title: str, tables: dict[str, list[Found]]) -> str:
    """A table for each metric."""
    parts = [f'<h2 id="s{number}">{escape(title)}</h2><div class="tables">']
    for text, rows in tables.items():
        most = max(x for _, *values in rows for x in values if x is not None) or 1.0
        lines = "".join(line(*row, most=most, more="*" in text) for row in rows)
        parts.append(
            f"<div><table><tr><th>{escape(text)}</th><th>A</th><th>B</th><th>B / A</th><th></th></tr>{lines}</table></div>"
        )
    return "\n".join(parts) + "</div>"


def judged(a: float | None, b: float | None, more: bool) -> tuple[str, float | None]:
    """better, worse, same or "" where there is no ratio; and the ratio B / A."""
    if a is None or b is None or not a:
        return "", None
    ratio = b / a
    if abs(ratio - 1) <= BAND / 100:
        return "same", ratio
    return "better" if (ratio > 1) == more else "worse", ratio


def line(name: str, a: float | None, b: float | None, most: float, more: bool) -> str:
    """One system: both values, their ratio, and two bars."""
    kind, ratio = judged(a, b, more)
    bars = "".join(
        f'<rect x="0" y="{y}" width="{120 * (v or 0) / most:.1f}" height="6" fill="{c}"/>'
        for y, v, c in ((1, a, "#999"), (8, b, "#4c7fd0"))
    )
    shown_ratio = "" if ratio is None else f"{ratio:.3f}" if ratio < 1000 else f"{ratio:,.0f}"
    return (
        f'<tr><td>{escape(name)}</td><td>{number(a)}</td><td>{number(b)}</td><td class="{kind}">{shown_ratio}</td>'
        f'<td><svg width="120" height="15">{bars}</svg></td></tr>'
    )


def number(found: float | None) -> str:
    """Four digits, never as a power of ten."""
    if found is None:
        return "–"
    return f"{found:,.0f}" if found >= 1000 else f"{found:.4g}" if found >= 1e-3 or not found else "&lt; 0.001"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="zerolite bench compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, help="a result file, or a folder of them")
    parser.add_argument("b", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("compare.html"))
    args = parser.parse_args()
    a, b = read(args.a), read(args.b)
    for path, found in ((args.a, a), (args.b, b)):
        if not found:
            parser.error(f"{path}: expected a .jsonl file with results or a folder of them, found none")
    try:
        args.out.write_text(page(a, b, (str(args.a), str(args.b))), encoding="utf-8")
    except ValueError as error:
        parser.error(str(error))
    print(f"wrote {shown(args.out.resolve())}")


if __name__ == "__main__":
    main()
