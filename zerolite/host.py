"""What this process may use of its host."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from pathlib import Path

_CGROUP = (Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))


def usable_cores() -> int:
    """Cores that this process may run on: its affinity, at most the CPU quota of its cgroup, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(min(cores, _quota(cores)), 1)


def _quota(cores: int) -> int:
    unified, legacy = _CGROUP
    try:
        if unified.exists():
            quota, period = unified.read_text().split()
        else:
            quota, period = legacy.read_text().strip(), legacy.with_name("cpu.cfs_period_us").read_text().strip()
        return cores if quota in ("max", "-1") else -(-int(quota) // int(period))
    except (OSError, ValueError):
        return cores


def usable_memory() -> tuple[int, int]:
    """Bytes of memory that this process may have: free for use now, and in all (the host's, at most its cgroup's)."""
    values = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, value = line.split(":")
            values[name] = int(value.split()[0]) << 10
    total = values.get("MemTotal", 1 << 62)
    free = values.get("MemAvailable", total)
    root = Path("/sys/fs/cgroup")
    for limit, usage, stat in (
        (root / "memory.max", root / "memory.current", root / "memory.stat"),
        (root / "memory/memory.limit_in_bytes", root / "memory/memory.usage_in_bytes", root / "memory/memory.stat"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max", or no such cgroup: the host's
            most = int(limit.read_text())
            cache = dict(line.split() for line in stat.read_text().splitlines())
            used = int(usage.read_text()) - int(cache.get("inactive_file", 0))
            total, free = min(total, most), min(free, max(most - used, 0))
    return free, total


def trim_heap() -> None:
    """Gives memory that was freed back to the system, where the C library keeps it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def identity() -> tuple[str, int]:
    """(host, process): equal hosts share memory. A container has its own boot id view but shares the kernel's, so the
    IPC and mount namespaces count too. ZEROLITE_HOST overrides the name, e.g. to keep two halves of a host apart."""
    if "ZEROLITE_HOST" in os.environ:
        return os.environ["ZEROLITE_HOST"], os.getpid()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        spaces = "-".join(os.readlink(f"/proc/self/ns/{kind}") for kind in ("ipc", "mnt"))
    except OSError:
        boot, spaces = socket.gethostname(), ""
    return f"{boot}/{spaces}", os.getpid()
