"""Live tensor storages by term, beside what the plan says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from zerolite.bucket import Bucket
from zerolite.placement import TERMS, Plan


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by term: planned at rest, and live when measured."""

    planned: dict[str, int]
    live: dict[str, int]
    numel: int  # parameters of the whole model

    def __str__(self) -> str:
        lines = [f"{'':8}{'planned':>16}{'live':>16}{'live a parameter':>18}"]
        for term in TERMS:
            each = self.live[term] / max(self.numel, 1)
            lines.append(f"{term:8}{self.planned[term]:>16,}{self.live[term]:>16,}{each:>18.3f}")
        return "\n".join(lines)


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


def measure(plan: Plan, buckets: Iterable[Bucket]) -> Memory:
    """Measures live storages now. Gradients are at rest between backward and step."""
    live = dict.fromkeys(TERMS, 0)
    for bucket in buckets:
        for term, tensors in bucket.storages().items():
            live[term] += storage_bytes(tensors)
    return Memory(plan.bytes_at_rest, live, plan.numel)
