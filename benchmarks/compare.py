"""A page that compares two result files (or folders of them): one self-contained HTML file.

zerolite bench compare OLD.jsonl NEW.jsonl [-o compare.html]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

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
        ("peak", "peak, MB, all ranks", 2.0**-20),
        ("rest", "at rest, MB, all ranks", 2.0**-20),
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
    "scale": [("serial", "forecast step, s", 1.0)],
}
NAMES = ("model", "ranks", "numel", "system", "side", "stage", "moments", "seed", "limit", "hardware", "known")

_PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title><style>
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .6em 0 1.6em } th, td { padding: .2em .7em; text-align: right }
th:first-child, td:first-child { text-align: left } tr:nth-child(even) { background: #f6f6f6 }
.better { color: #1a7f37 } .worse { color: #b3261e } .same { color: #777 } svg { vertical-align: middle } .note { color: #666 }
</style></head><body><h1>$title</h1>
<p class="note">A is $a, B is $b. B / A below 1 is less in B; * where more is better. Coloured beyond $band %.
Two files of one machine can be compared in absolute terms; of others, look at ratios within each.</p>
$conditions
$sections
$only
</body></html>
""")
BAND = 5.0  # per cent: what differs by less is told in grey


def key(row: Row) -> tuple[str, ...]:
    """What a row is about: rows of two files with the same key are compared."""
    kind = row["kind"] if "kind" in row else row["benchmark"]
    return (row["benchmark"], kind, *(f"{name} {row[name]}" for name in NAMES if row.get(name) is not None))


def label(row: Row) -> str:
    """The row's name within its section."""
    if "system" in row:
        return str(row["system"])
    text = str(row.get("side", ""))
    return text or ", ".join(f"{name} {row[name]}" for name in NAMES if row.get(name) is not None)


def value(row: Row, name: str) -> float | None:
    """A metric of a row; of quantiles the median."""
    found = row.get(name)
    if isinstance(found, list):
        found = quantile([float(x) for x in found], 0.5) if found else None
    return float(found) if isinstance(found, (int, float)) and found >= 0 else None


def page(a: list[Row], b: list[Row], names: tuple[str, str]) -> str:
    """The page. Raises ValueError where the files have nothing in common."""
    left, right = ({key(row): row for row in rows if row["benchmark"] in METRICS} for rows in (a, b))
    both = [name for name in left if name in right]
    if not both:
        raise ValueError("compare: expected two files with a benchmark, model and system in common, got none")
    sections: dict[str, list[tuple[Row, Row]]] = {}
    for name in both:
        row = left[name]
        where = f", {row['model']}" if "model" in row else ""
        heading = f"{row['benchmark']}{where}" + (f", {row['ranks']} ranks" if "ranks" in row else "")
        sections.setdefault(heading, []).append((row, right[name]))
    only = [told for rows, other, side in ((left, right, "A"), (right, left, "B")) for told in only_in(rows, other, side)]
    for rows, side in ((a, "A"), (b, "B")):
        away = [row for row in rows if row["benchmark"] in ("skipped", "failed")]
        only += [f"<li>left out of {side}: {escape(row['system'])}: {escape(str(row['why']))}</li>" for row in away]
    return _PAGE.substitute(
        title="Benchmarks compared",
        a=f"<b>{escape(names[0])}</b>",
        b=f"<b>{escape(names[1])}</b>",
        band=f"{BAND:g}",
        conditions=conditions(a[0], b[0]),
        sections="\n".join(section(heading, pairs) for heading, pairs in sections.items()),
        only="<h2>Not in both</h2><ul>" + "".join(only) + "</ul>" if only else "",
    )


def only_in(rows: dict[tuple[str, ...], Row], other: dict[tuple[str, ...], Row], side: str) -> Iterable[str]:
    for name in rows:
        if name not in other:
            yield f"<li>only in {side}: {escape(', '.join(name[1:]))}</li>"


def conditions(a: Row, b: Row) -> str:
    """Hardware, versions, commit and command of both, differing lines in bold."""
    lines = []
    both = [row.get("conditions", {}) for row in (a, b)]
    for name in dict.fromkeys([*both[0], *both[1]]):
        values = [c.get(name) for c in both]
        if name == "versions":
            values = [", ".join(f"{k} {v}" for k, v in (each or {}).items() if v) for each in values]
        tag = "td" if values[0] == values[1] else "th"
        lines.append(f"<tr><td>{escape(name)}</td>" + "".join(f"<{tag}>{escape(str(v))}</{tag}>" for v in values) + "</tr>")
    return f"<table><tr><th></th><th>A</th><th>B</th></tr>{''.join(lines)}</table>"


def section(heading: str, pairs: list[tuple[Row, Row]]) -> str:
    """A table for each metric that both sides have."""
    parts = [f"<h2>{escape(heading)}</h2>"]
    for name, text, factor in METRICS[pairs[0][0]["benchmark"]]:
        found = [
            (label(a), x * factor, y * factor)
            for a, b in pairs
            if (x := value(a, name)) is not None and (y := value(b, name)) is not None
        ]
        if found:
            most = max(max(x, y) for _, x, y in found) or 1.0
            rows = "".join(line(*each, most=most, more="*" in text) for each in found)
            parts.append(f"<table><tr><th>{escape(text)}</th><th>A</th><th>B</th><th>B / A</th><th></th></tr>{rows}</table>")
    return "\n".join(parts)


def line(name: str, a: float, b: float, most: float, more: bool) -> str:
    """One system: both values, their ratio, and two bars."""
    ratio = b / a if a else None
    kind = "same"
    if ratio is not None and abs(ratio - 1) > BAND / 100:
        kind = "better" if (ratio > 1) == more else "worse"
    bars = "".join(
        f'<rect x="0" y="{y}" width="{160 * v / most:.1f}" height="6" fill="{c}"/>'
        for y, v, c in ((1, a, "#aaa"), (8, b, "#4c72b0"))
    )
    told = "" if ratio is None else f"{ratio:.3f}"
    return (
        f'<tr><td>{escape(name)}</td><td>{a:,.4g}</td><td>{b:,.4g}</td><td class="{kind}">{told}</td>'
        f'<td><svg width="160" height="15">{bars}</svg></td></tr>'
    )


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
