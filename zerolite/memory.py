"""Live tensor storages by term, beside what the plan says, and the memory of the process.

plan's term   finer terms
params        params: at rest                units: whole while they are in use, beside what rests
grads         grads: at rest                 flight: buckets on their way, not packed, packed, sent or being summed
                                             kept: shared memory that held a round and stays for the next
states        master: remainder or fp32 master          moments
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zerolite.bucket import Bucket
from zerolite.placement import TERMS, Plan

#: Finer terms by term of the plan, in the order in which they are shown.
FINE = {"params": ("params", "units"), "grads": ("grads", "flight"), "states": ("master", "moments")}
KEPT = "kept"  # process memory that holds nothing between rounds: beside the terms
NAMES = {
    "params": "parameters at rest",
    "units": "whole units in use",
    "grads": "gradients at rest",
    "flight": "buckets in flight",
    KEPT: "slots kept for rounds",
    "master": "remainder or master",
    "moments": "moments",
}


@dataclass(frozen=True)
class Process:
    """Memory of this process: of the host, and of the device where there is one; None where it cannot be read."""

    resident: int | None = None  # what is mapped and in memory, shared pages in full
    proportional: int | None = None  # the same, shared pages divided by the processes that share them
    allocated: int | None = None  # by torch on the device
    reserved: int | None = None  # by torch's allocator from the device


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by term: planned at rest, and live when measured."""

    planned: dict[str, int]
    live: dict[str, int]
    numel: int  # parameters of the whole model
    planned_fine: dict[str, int] = field(default_factory=dict)  # by finer term
    live_fine: dict[str, int] = field(default_factory=dict)
    process: Process = field(default_factory=Process)

    def __str__(self) -> str:
        lines = [f"{'':24}{'planned':>16}{'live':>16}{'live a parameter':>18}"]

        def row(name: str, planned: int, live: int) -> None:
            lines.append(f"{name:24}{planned:>16,}{live:>16,}{live / max(self.numel, 1):>18.3f}")

        for term in TERMS:
            row(term, self.planned[term], self.live[term])
            for fine in FINE[term] if self.live_fine else ():
                row(f"  {NAMES[fine]}", self.planned_fine[fine], self.live_fine[fine])
        row("total", sum(self.planned.values()), sum(self.live.values()))
        if self.live_fine.get(KEPT):
            lines.append(f"{NAMES[KEPT]:40}{self.live_fine[KEPT]:>16,}  shared memory, beside the plan")
        for name, value in vars(self.process).items():
            if value is not None:
                lines.append(f"{_PROCESS[name]:40}{value:>16,}")
        return "\n".join(lines)


_PROCESS = {
    "resident": "process, resident",
    "proportional": "process, its part of what it shares",
    "allocated": "device, allocated by torch",
    "reserved": "device, reserved by torch",
}


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct memory behind `tensors` (of a view, what it spans: a shared segment holds more)."""
    found: dict[int, list[tuple[int, int]]] = {}
    for t in tensors:
        if t.numel() and t.untyped_storage().nbytes():
            start = int(t.storage_offset()) * t.element_size()
            extent = 1 + sum((int(size) - 1) * int(step) for size, step in zip(t.shape, t.stride(), strict=True))
            found.setdefault(t.untyped_storage().data_ptr(), []).append((start, start + extent * t.element_size()))
    total = 0
    for spans in found.values():
        end = 0
        for start, stop in sorted(spans):
            total += max(stop - max(start, end), 0)
            end = max(end, stop)
    return total


def holdings(bucket: Bucket) -> dict[str, list[Tensor]]:
    """A bucket's live tensors by term of FINE (views of one storage count once, in the first term that has them)."""
    if bucket.home is None:
        params, units = ([bucket.shard], [bucket.full]) if bucket.plan.params.sharded else ([bucket.full, bucket.shard], [])
        params += [bucket.mine] if bucket.mine is not bucket.own else []
    else:  # `full` and `shard` are the same memory, mapped twice: a gather takes none
        params, units = [bucket.shard if bucket.plan.params.sharded else bucket.full], []
        params += [bucket.mine] if bucket.mine is not bucket.shard else []
    grads = bucket.grads
    return {
        "params": params,
        "units": units,
        "grads": grads.resting() if grads is not None else [],
        "flight": grads.flying() if grads is not None else [],
        "kept": grads.lane.kept() if grads is not None else [],
        "master": [bucket.rest],
        "moments": bucket.state.tensors() if bucket.state is not None else [],
    }


def live_by_bucket(buckets: Iterable[Bucket]) -> tuple[dict[str, dict[str, int]], int]:
    """Live bytes by bucket and finer term, and what is kept for rounds and holds none now.

    Memory that two finer terms of one term view counts for the first.
    """
    found: dict[str, dict[str, int]] = {}
    rounds: list[Tensor] = []
    kept: list[Tensor] = []
    for bucket in buckets:
        held = holdings(bucket)
        found[bucket.name] = terms = {}
        for fine in FINE.values():
            seen: list[Tensor] = []
            before = 0
            for term in fine:
                if held[term]:
                    seen += held[term]
                    total = storage_bytes(seen)
                    terms[term], before = total - before, total
                else:
                    terms[term] = 0
        rounds += held["grads"] + held["flight"] if held[KEPT] else []
        kept += held[KEPT]
    return found, storage_bytes(rounds + kept) - storage_bytes(rounds) if kept else 0


def fine_plan(plan: Plan, buckets: Iterable[Bucket]) -> dict[str, int]:
    """Bytes at rest by finer term."""
    master = 0
    for bucket in buckets:
        layout, _, rest, trained = bucket.row
        master += (layout.shard if plan.states.sharded else layout.numel) * rest if trained else 0
    rests = plan.bytes_at_rest
    return {
        "params": rests["params"],
        "units": 0,
        "grads": rests["grads"],
        "flight": 0,
        KEPT: 0,
        "master": master,
        "moments": rests["states"] - master,
    }


def measure(plan: Plan, buckets: list[Bucket]) -> Memory:
    """Measures live storages now. Gradients are at rest between backward and step."""
    by_bucket, kept = live_by_bucket(buckets)
    fine = {term: sum(held[term] for held in by_bucket.values()) for parts in FINE.values() for term in parts}
    live = {term: sum(fine[part] for part in FINE[term]) for term in TERMS}
    process = process_memory(buckets[0].full.device if buckets else torch.device("cpu"), True)
    return Memory(plan.bytes_at_rest, live, plan.numel, fine_plan(plan, buckets), {**fine, KEPT: kept}, process)


def process_memory(device: torch.device, proportional: bool) -> Process:
    """The process now. Its proportional part walks every mapping (milliseconds), so it is read only where asked for."""
    device_bytes: tuple[int | None, int | None] = (None, None)
    if device.type == "cuda":
        device_bytes = (torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device))
    return Process(_resident(), _proportional() if proportional else None, *device_bytes)


def _resident() -> int | None:
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read(128).split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _proportional() -> int | None:
    try:
        with open("/proc/self/smaps_rollup", "rb") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(b"Pss:"))
    except (OSError, StopIteration):
        return None
