"""What every benchmark shares: interleaved rounds, quantiles, hardware and versions, JSON lines."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
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


CACHE = str(Path(tempfile.gettempdir()) / f"zerolite-bench-{os.getuid()}")  # peers compile at their first step


def on_ranks(
    ranks: int, command: list[str], timeout: float, sample: bool = False, env: dict[str, str] | None = None
) -> dict[str, Any] | str:
    """Runs `python command --out FILE` once for each rank, one thread each; returns the JSON that rank 0 wrote to FILE.

    sample  also "peak": the largest sum over ranks of PSS, bytes (a page that ranks share counts once)

    Where it fails, the end of the log.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log"
        whole = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        whole |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(ranks)}
        whole |= {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": CACHE}
        whole |= env or {}
        peak = 0
        with log.open("w") as file:
            running = [
                subprocess.Popen(
                    [sys.executable, *command, "--out", str(out)],
                    env={**whole, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=file,
                    stderr=file,
                )
                for rank in range(ranks)
            ]
            deadline = time.monotonic() + timeout
            while any(rank.poll() is None for rank in running):
                if sample:
                    peak = max(peak, pss([rank.pid for rank in running]))
                if time.monotonic() > deadline or any(rank.poll() not in (None, 0) for rank in running):
                    for rank in running:
                        rank.kill()
                time.sleep(0.02 if sample else 0.2)
        if not out.exists():
            return "\n".join(log.read_text().strip().splitlines()[-3:])
        return {**json.loads(out.read_text()), **({"peak": peak} if sample else {})}


def pss(pids: list[int]) -> int:
    """Bytes of physical memory of some processes, shared pages once."""
    total = 0
    for pid in pids:
        for line in _lines(f"/proc/{pid}/smaps_rollup"):
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


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
