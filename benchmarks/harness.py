"""What every benchmark shares: interleaved rounds, quantiles, hardware and versions, JSON lines."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def quantile(values: list[float], q: float) -> float:
    """The q-quantile by linear interpolation."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def interleave(sides: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each side, A B C A B C ..., so that a drift of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + warmup):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(a: list[float], b: list[float]) -> float:
    """Median of the ratios a / b, round by round."""
    return quantile([x / y for x, y in zip(a, b, strict=True)], 0.5)


def conditions() -> dict[str, Any]:
    """Hardware, versions and commit."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    versions = {}
    for name in ("torch", "deepspeed", "transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    import os

    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit + ("+changes" if dirty else ""),
        "command": " ".join(["python", str(Path(sys.argv[0])), *sys.argv[1:]]),
    }


def store(name: str, rows: list[dict[str, Any]]) -> Path:
    """Writes rows with the conditions to benchmarks/results/NAME.jsonl (the latest run replaces the one before)."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with path.open("w") as file:
        for row in rows:
            file.write(json.dumps({**row, "conditions": conditions()}) + "\n")
    return path


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
