"""Writes docs/benchmarks.md and its plots from stored results; nothing is measured.

zerolite bench report [--results benchmarks/results] [--docs docs]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness, plots, tables
from benchmarks.harness import ROOT, read, shown

HEAD = """# Benchmarks

Written by `zerolite bench report` from `benchmarks/results/`. The command above each table measures it again; `make peers
bench` measures a part in about 45 minutes on 2 cores. [benchmarks/README.md](../benchmarks/README.md) has the rules. Sides
run interleaved in one run and are compared by the median of their ratios; times are medians, or p20, p50, p80. Machines
differ and are noisy, so only ratios inside one table mean something. What zerolite does not win is listed as well.
"""


CAPTIONS = {
    "memory-by-term": "Shorter is better. Bars are zerolite's plan at rest by term; marks are what was measured of all.",
    "step-by-part": "Shorter is better. The thin grey bar is communication under way, which overlaps with the parts above it.",
    "overhead-against-size": "Lower is better: a step less the model's own forward and backward, on one processor.",
    "roofline": "Operations a second of each kernel against operations a byte; lines are ceilings that plain loops reached.",
    "scale": "A forecast, not a measurement: tokens a second and rank on stated hardware, from no overlap to full overlap.",
}


KINDS = ("update", "passes", "small", "small-clip", "footprint", "scale", "construct")


def write(results: Path, docs: Path | None = None) -> list[Path]:
    """Writes the page and the plots for which there are results; returns their paths."""
    docs = docs or (ROOT / "docs" if results == ROOT / "benchmarks" / "results" else results)
    pictures = docs / "bench"
    pictures.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(results, pictures)
    page = docs / "benchmarks.md"
    page.write_text(text(results, [path.relative_to(docs) for path in drawn]))
    return [page, *drawn]


def text(results: Path, pictures: Sequence[Path] = ()) -> str:
    """The page."""
    blocks = [read(path) for path in sorted(results.glob("step-*.jsonl"))]
    found = {name: read(results / f"{name}.jsonl") for name in KINDS}
    parts = [HEAD]
    for path in pictures:
        parts.append(f"![{path.stem.replace('-', ' ')}]({path.as_posix()})\n\n{CAPTIONS.get(path.stem, '')}\n")
    parts += [getattr(tables, name)(found[name]) for name in ("update", "passes") if found[name]]
    parts.append(tables.step(blocks, found["passes"], found["update"]))
    parts += [tables.largest(read(path)) for path in sorted(results.glob("largest-*.jsonl"))]
    parts += [tables.exchange(read(path)) for path in sorted(results.glob("exchange-*.jsonl"))]
    parts += [tables.small(found[name]) for name in ("small", "small-clip") if found[name]]
    parts += [tables.footprint(found["footprint"])] if found["footprint"] else []
    parts += [getattr(tables, name)(found[name]) for name in ("scale", "construct") if found[name]]
    parts.append(tables.moments(read(results / "moments.jsonl")) if (results / "moments.jsonl").exists() else "")
    parts.append(tables.device([row for path in sorted(results.glob("device-*.jsonl")) for row in read(path)]))
    return "\n".join(part for part in parts if part)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="zerolite bench report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--docs", type=Path, default=None, help="folder of the page and the plots")
    args = parser.parse_args()
    for path in write(args.results.resolve(), args.docs and args.docs.resolve()):
        print(f"wrote {shown(path)}")


if __name__ == "__main__":
    main()
