"""What a timeline has recorded: samples, and the conditions that they were taken under. No tensor, no optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from zerolite.memory import FINE, KEPT, NAMES, Process

#: Terms in the order in which they are stacked: what rests at the bottom.
TERMS = ("params", "master", "moments", "grads", KEPT, "units", "flight")
PHASES = ("forward", "backward", "exchange", "update", "publish", "step", "other")
#: Phases of the verbs inside a step. In a backward an exchange is part of it.
VERBS = {"pack": "exchange", "exchange": "exchange", "average": "exchange", "update": "update", "publish": "publish"}

assert {*TERMS} == {*NAMES} == {KEPT, *(part for parts in FINE.values() for part in parts)}


@dataclass(frozen=True)
class Sample:
    """The moment after one event."""

    seconds: float  # since the start, without the time that recording took
    phase: str  # of PHASES: what the event belongs to
    event: str  # a verb, a phase that begins or ends, "start" or "stop"
    name: str  # the bucket; "begin" or "end" of a phase
    terms: tuple[int, ...]  # live bytes in the order of TERMS
    buckets: tuple[int, ...]  # live bytes in the order of Recording.buckets, without what is kept for rounds
    process: Process

    @property
    def live(self) -> int:
        return sum(self.terms)

    @property
    def work(self) -> str:
        """The phase of the time before the event: sending and averaging inside a backward count as exchange, and updates there
        as update."""
        return "exchange" if self.event in ("exchange", "average") else "update" if self.event == "update" else self.phase

    @property
    def label(self) -> str:
        return f"{self.event} {self.name}".strip()


@dataclass
class Recording:
    """All of one timeline on one rank."""

    conditions: dict[str, Any]  # stage, ranks, dtype and so on, as they are shown
    planned: dict[str, int]  # bytes at rest by finer term
    sizes: dict[str, int]  # ranks of the world and bytes of the largest bucket, for the explanation
    options: dict[str, Any]  # what may be changed to hold less, and what it is now
    buckets: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    highest: Sample | None = None
    at_peak: dict[str, dict[str, int]] = field(default_factory=dict)  # by bucket and finer term, at the highest sample
    dropped: int = 0  # samples after the limit: looked at for the peak, not kept
    seconds_recording: float = 0.0

    @property
    def rest(self) -> int:
        """Planned bytes at rest."""
        return sum(self.planned.values())

    def most(self) -> dict[str, int]:
        """The most that each bucket held."""
        columns = [sample.buckets for sample in self.samples] + ([self.highest.buckets] if self.highest else [])
        width = len(self.buckets)
        return {
            name: max((row[k] for row in columns if k < len(row)), default=0) for k, name in enumerate(self.buckets[:width])
        }

    def as_json(self) -> dict[str, Any]:
        """Everything, in plain values."""
        return {
            "conditions": self.conditions,
            "planned": self.planned,
            "terms": list(TERMS),
            "buckets": self.buckets,
            "dropped": self.dropped,
            "seconds_recording": self.seconds_recording,
            "at_peak": self.at_peak,
            "highest": asdict(self.highest) if self.highest else None,
            "samples": [asdict(sample) for sample in self.samples],
        }


def thin(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most about `most` samples: of each stretch of time the highest and the lowest, and the ends."""
    if len(samples) <= most:
        return list(samples)
    first, length = samples[0].seconds, max(samples[-1].seconds - samples[0].seconds, 1e-9)
    bins: dict[int, list[int]] = {}
    for number, sample in enumerate(samples):
        bins.setdefault(int((sample.seconds - first) / length * (most // 2 - 1)), []).append(number)
    kept = {0, len(samples) - 1}
    for numbers in bins.values():
        kept |= {max(numbers, key=lambda n: samples[n].live), min(numbers, key=lambda n: samples[n].live)}
    return [samples[n] for n in sorted(kept)]


def amount(number: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB"):
        if abs(number) < 1024:
            return f"{number:,.0f} {unit}" if unit == "B" or abs(number) >= 100 else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.2f} GiB"


def short(name: str, most: int) -> str:
    """The end of a name that is too long for its place."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def stretches(samples: Sequence[Sample]) -> list[tuple[float, float, str]]:
    """(start, stop, phase) of the time between samples, neighbours of one phase joined."""
    found: list[tuple[float, float, str]] = []
    for before, after in pairwise(samples):
        if found and found[-1][2] == after.work:
            found[-1] = (found[-1][0], after.seconds, after.work)
        elif after.seconds > before.seconds:
            found.append((before.seconds, after.seconds, after.work))
    return found


#: Colours of terms and phases, the same in both figures.
TERM_COLOURS = {
    "params": "#4c72b0",
    "master": "#2f7d4f",
    "moments": "#8cc79a",
    "grads": "#dd8452",
    KEPT: "#b9b9b9",
    "units": "#9db8e6",
    "flight": "#c44e52",
}
PHASE_COLOURS = {
    "forward": "#6baed6",
    "backward": "#fdae6b",
    "exchange": "#ad6cb3",
    "update": "#41ab5d",
    "publish": "#d9b300",
    "step": "#969696",
    "other": "#e4e4e4",
}
