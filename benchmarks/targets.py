"""The project's targets, beside what was measured: a missed one is named with its figure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from benchmarks.harness import Row
from benchmarks.systems import ALONE

OTHERS = 0.1  # cores that other processes may take while a system is timed
DEEPSPEED, DDP, PEAK, FIRST = 1 / 6, 1 / 2, 1 / 2, 1 / 2  # at most
EXACT, INT8 = 2.0, 3.0  # at least
ABOVE = "peak_a_parameter"  # peak memory above imports, process group and a tiny model's step, which are no system's


@dataclass(frozen=True)
class Target:
    """One ratio and its bound."""

    system: str
    metric: str  # which figure of its row
    peer: Row  # whose figure it is divided by
    bound: float
    figure: float
    least: bool = False  # at least the bound; else at most

    @property
    def of(self) -> str:
        """The figure and the peer in words."""
        words = {"first": "first step of", ABOVE: "peak memory above imports of", "numel": "largest model, of"}
        return f"{words.get(self.metric, f'{self.metric} of')} {self.peer['system']}'s"

    @property
    def met(self) -> bool:
        return self.figure >= self.bound if self.least else self.figure <= self.bound

    def __str__(self) -> str:
        return f"{self.of} {self.figure:.3f} ({'at least' if self.least else 'at most'} {self.bound:.3f})"


def stage_of(system: str) -> int | None:
    """The ZeRO stage in a system's name."""
    found = re.match(r"(?:zerolite|DeepSpeed) (\d)", system)
    return int(found[1]) if found else None


def best(rows: list[Row], metric: str, start: str, stage: int | None = None) -> Row | None:
    """The row with the least `metric` of the systems whose names begin with `start`, of one stage."""
    among = [row for row in rows if row["system"].startswith(start) and stage in (None, stage_of(row["system"]))]
    return min((row for row in among if row.get(metric)), key=lambda row: row[metric], default=None)


def of_steps(rows: list[Row]) -> list[Target]:
    """Targets of the rows of one model at one world size; offload and rounded moments are compared alike."""
    found: list[Target] = []
    rows = [row for row in rows if row["benchmark"] == "step"]
    ddp, quiet = best(rows, "overhead", "DDP"), not disturbed(rows)
    for row in rows:
        name, stage = row["system"], stage_of(row["system"])
        if not name.startswith("zerolite") or stage is None:
            continue
        pairs = [("overhead", best(rows, "overhead", "DeepSpeed", stage), DEEPSPEED), ("overhead", ddp, DDP)]
        pairs += [
            (ABOVE, best(rows, ABOVE, "DeepSpeed", stage), PEAK),
            ("first", best(rows, "first", "DeepSpeed", stage), FIRST),
        ]
        for metric, peer, bound in pairs:
            if peer is not None and stage > 0 and (metric != "overhead" or (quiet and row["overhead"] > 0)):
                found.append(Target(name, metric, peer, bound, row[metric] / peer[metric]))
    return found


def disturbed(rows: list[Row]) -> str:
    """Why the overheads of a block say nothing: something else slowed down "model alone", which takes the same off each;
    empty where nothing did."""
    for row in rows:
        if row["system"] == ALONE and row.get("others", 0.0) > OTHERS:
            return f"other processes took {row['others']:.1f} cores while model alone was timed"
    shorter = [row["system"] for row in rows if row["system"].startswith(("DDP", "DeepSpeed")) and row["overhead"] <= 0]
    return f"model alone took longer than {', '.join(shorter)}" if shorter else ""


def of_largest(rows: list[Row]) -> list[Target]:
    """Targets of the largest models at two ranks: the best exact system and the best with int8 moments, of DeepSpeed's best."""
    rows = [row for row in rows if row["benchmark"] == "largest" and row["ranks"] == 2 and row["numel"]]
    peers = [row for row in rows if row["system"].startswith("DeepSpeed")]
    found: list[Target] = []
    for rounded, bound in ((False, EXACT), (True, INT8)):
        ours = [r for r in rows if r["system"].startswith("zerolite") and ("moments" in r["system"]) == rounded]
        if peers and ours:
            most, peer = max(ours, key=lambda r: r["numel"]), max(peers, key=lambda r: r["numel"])
            found.append(Target(most["system"], "numel", peer, bound, most["numel"] / peer["numel"], least=True))
    return found


def missed(targets: list[Target]) -> str:
    """The targets that are missed, a line for each system; empty where there are none to compare."""
    if not targets:
        return ""
    late: dict[str, list[str]] = {}
    for target in targets:
        if not target.met:
            late.setdefault(target.system, []).append(str(target))
    lines = [f"- {system}: {', '.join(figures)}" for system, figures in late.items()]
    if not lines:
        return f"\nAll {len(targets)} targets are met.\n"
    return "\nTargets missed in this run:\n\n" + "\n".join(lines) + "\n"
