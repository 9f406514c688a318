"""What this process may use of its host."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Sequence
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def _groups(controller: str) -> list[Path]:
    """Folders of the control groups that this process is in, the innermost first: of version 2, then of version 1. Every one
    limits it; a process without a cgroup namespace (of a batch system, say) sees its own only by its path."""
    folders: dict[Path, None] = {}
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    for names, path in sorted(line.split(":", 2)[1:] for line in lines):
        if not names or controller in names.split(","):
            base = _CGROUPS / controller if names else _CGROUPS
            inner = base / path.lstrip("/")
            folders.update(dict.fromkeys(p for p in (inner, *inner.parents) if p.is_relative_to(base)))
    return list(folders | dict.fromkeys((_CGROUPS, _CGROUPS / controller)))


def affinity() -> frozenset[int]:
    """Numbers of the cores that this process may run on."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def usable_cores() -> int:
    """Cores that this process may run on: its affinity, at most the CPU quota of its cgroup, at least 1."""
    cores = len(affinity())
    return max(min(cores, _quota(cores)), 1)


def core_share(here: int, others: Sequence[frozenset[int]]) -> int:
    """Cores for this process among `here` processes of the host, at least 1; `others` are affinities of some of them, its own
    included. Where a launcher has bound each to cores of its own these are not divided, but a CPU quota is, which is of all."""
    mine = affinity()
    sharing = sum(bool(mine & cores) for cores in others)
    sharing = -(-here * sharing // max(len(others), 1))  # of all processes as large a part as of those that are known
    most = _quota(len(mine) * max(here, 1)) // max(here, 1)
    return max(min(len(mine) // max(sharing, 1), most), 1)


def _quota(cores: int) -> int:
    for folder in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # "max", or no such group
            unified = folder / "cpu.max"
            if unified.exists():
                quota, period = unified.read_text().split()
            else:
                quota, period = (folder / "cpu.cfs_quota_us").read_text(), (folder / "cpu.cfs_period_us").read_text()
            if int(quota) > 0:
                cores = min(cores, -(-int(quota) // int(period)))
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
    for folder in _groups("memory"):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):  # "max", or no such group: the host's
                most = int((folder / limit).read_text())
                cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / usage).read_text()) - int(cache.get("total_inactive_file", cache.get("inactive_file", 0)))
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
