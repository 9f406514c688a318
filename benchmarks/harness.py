"""What every benchmark shares: interleaved rounds, quantiles, ranks as processes, memory, hardware and versions, JSON lines."""

from __future__ import annotations

import functools
import json
import os
import platform
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(os.environ.get("ZEROLITE_BENCH_RESULTS") or ROOT / "benchmarks" / "results")
PACKAGES = ("torch", "zerolite", "deepspeed", "transformers", "torchao", "flashoptim", "bitsandbytes")
Row = dict[str, Any]


def quantile(values: list[float], q: float) -> float:
    """The q-quantile by linear interpolation."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def quantiles(values: list[float], scale: float = 1.0) -> list[float]:
    """p20, p50, p80."""
    return [quantile(values, q) * scale for q in (0.2, 0.5, 0.8)]


def shuffled(names: Iterable[str], rounds: int) -> list[list[str]]:
    """All names in each round, so that a drift of the machine meets all alike; each round in another order, so that none always
    follows the same other one. The same in every process."""
    known, order = list(names), random.Random(0)
    return [order.sample(known, len(known)) for _ in range(rounds)]


def interleave(sides: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each side, in `shuffled` rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number, names in enumerate(shuffled(sides, rounds + warmup)):
        for name in names:
            start = time.perf_counter()
            sides[name]()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(a: list[float], b: list[float]) -> float:
    """Median of the ratios a / b, round by round."""
    return quantile([x / y for x, y in zip(a, b, strict=True)], 0.5)


# ---- ranks

CACHE = str(Path(tempfile.gettempdir()) / f"zerolite-bench-{os.getuid()}")  # peers compile at their first step


#: Timed runs: the C library keeps what is freed. Otherwise large temporaries are given back at each step or not, as each
#: process's heap happens to lie, and page faults (11,000 a step were seen) decide between systems. Memory is sampled without.
STEADY = {"MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}


NO_RESULT = "no result after"  # begins the reason of what took too long


class OverLimit(Exception):
    """The ranks together held more memory than they may."""

    def __init__(self, peak: int) -> None:
        super().__init__(f"{peak:,} bytes")
        self.peak = peak


def on_ranks(
    ranks: int,
    command: list[str],
    timeout: float,
    sample: bool = False,
    env: dict[str, str] | None = None,
    limit: int | None = None,
) -> Row | str:
    """Runs `python -m command --out FILE` once for each rank, with its part of the cores; the JSON that rank 0 wrote to FILE.

    sample  also "peak": the most bytes of `physical` memory of all ranks
    limit   of that sum: beyond it the ranks are killed and OverLimit is raised

    "others" is what other processes took meanwhile, in cores. Where it fails, the end of the log.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log"
        whole = _environment(ranks) | ({} if sample or limit is not None else STEADY) | (env or {})
        line = [sys.executable, "-m", *command, "--out", str(out)]
        peak, sample = 0, sample or limit is not None
        before = others()
        with log.open("w") as file:
            running = [
                subprocess.Popen(line, env={**whole, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=file, stderr=file)
                for rank in range(ranks)
            ]
            deadline = time.monotonic() + timeout
            try:
                while any(rank.poll() is None for rank in running):
                    if sample:
                        peak = max(peak, physical([rank.pid for rank in running], ranks))
                    if limit is not None and peak > limit:
                        raise OverLimit(peak)
                    if time.monotonic() > deadline:
                        return f"{NO_RESULT} {timeout:.0f} s"
                    if any(rank.poll() not in (None, 0) for rank in running):
                        break
                    time.sleep(0.02 if sample else 0.2)
            finally:
                codes = [rank.poll() for rank in running]
                for rank in running:
                    rank.kill()
                for rank in running:
                    rank.wait()
                for lock in Path(CACHE).glob("**/lock"):  # of a rank that was killed while it loaded what a peer compiles
                    lock.unlink(missing_ok=True)
        if not out.exists():
            return _reason(log.read_text(), codes)
        (start, busy), (stop, after) = before, others()
        result = {**json.loads(out.read_text()), "others": (after - busy) / (stop - start)}
        return {**result, **({"peak": peak} if sample else {})}


def others() -> tuple[float, float]:
    """Now, and seconds that cores have worked so far for what is not this process's ended children."""
    import psutil

    times, own = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
    steal, interrupts = getattr(times, "steal", 0.0), getattr(times, "irq", 0.0) + getattr(times, "softirq", 0.0)
    busy = times.user + times.system + getattr(times, "nice", 0.0) + steal + interrupts
    return time.monotonic(), busy - own.ru_utime - own.ru_stime


def _environment(ranks: int) -> dict[str, str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    mine = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    mine |= {"OMP_NUM_THREADS": str(max(len(os.sched_getaffinity(0)) // ranks, 1)), "PYTHONPATH": paths}
    return {**os.environ, **mine, "TORCH_EXTENSIONS_DIR": CACHE, "PYTHONWARNINGS": "ignore::FutureWarning"}


def _reason(log: str, codes: list[int | None]) -> str:
    """The signal that ended a rank by itself, and the first error of a log, else its end."""
    ended = [f"rank {rank} ended by {signal.Signals(-code).name}" for rank, code in enumerate(codes) if code and code < 0]
    lines = [line.strip() for line in log.strip().splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0] and not line.startswith("File")]
    return "; ".join([*ended[:1], errors[0] if errors else " / ".join(lines[-3:]) or "no output"])[:500]


# ---- memory and the wire


def physical(pids: list[int], ranks: int) -> int:
    """Bytes of physical memory of some of a run's processes, which has `ranks` that map the same files; shared pages once.

    The kernel's PSS, but for pages of files (libraries): those it divides by all processes that map them, which others of
    this machine may be too, so each rank counts its part of them among ranks.
    """
    total = 0
    for pid in pids:
        for line in _lines(f"/proc/{pid}/smaps_rollup"):
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                total += int(line.split()[1]) * 1024
        for line in _lines(f"/proc/{pid}/status"):
            if line.startswith("RssFile:"):
                total += int(line.split()[1]) * 1024 // ranks
    return total


def loopback() -> int | None:
    """Bytes that the loopback interface has carried: everything that processes of this host send each other by TCP."""
    for line in _lines("/proc/net/dev"):
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[0])
    return None


# ---- results


@functools.cache
def conditions() -> Row:
    """Hardware, versions, commit and command."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    memory = next((int(line.split()[1]) << 10 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), None)
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    arguments = [text.replace(f"{ROOT}{os.sep}", "") for text in sys.orig_argv[1:]]
    return {
        "cpu": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": memory,
        "gpu": _gpu(),
        "python": platform.python_version(),
        "system": platform.release(),
        "versions": versions,
        "commit": commit(),
        "command": " ".join(["python", *arguments]),
    }


@functools.cache
def commit() -> str:
    """The commit of this tree, "+changes" where files differ from it (results do not count)."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:  # no git here
            return ""

    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def store(name: str, rows: list[Row]) -> Path:
    """Writes rows with the conditions to RESULTS/NAME.jsonl (the latest run replaces the one before)."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps({**row, "conditions": conditions()}) + "\n" for row in rows))
    part.replace(path)
    return path


def read(path: Path) -> list[Row]:
    """Rows of a result file, or of all those of a folder; none where there is no such file."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines() if line.strip()]


def shown(path: Path) -> str:
    """A path as it is told: within the tree where it lies there."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
