"""What rests sharded, and where: ZeRO's stages as rows of a table of placements.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020), section 5,
names the stages; offload is the `home` of a placement. This is the only file that knows stage numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from zerolite.layout import ALIGN, Layout

STAGES = (0, 1, 2, 3)
OFFLOADS = (None, "states", "all")
TERMS = ("params", "grads", "states")


#: From this many ranks on, a bucket whose slices are smaller than this many bytes is reduced by the group itself: an
#: exchange sends a message to each rank, and small messages are bound by latency.
SCATTER_RANKS = 64
SCATTER_BYTES = 16 << 10


@dataclass(frozen=True)
class Placement:
    """How one kind of tensor rests: cut over ranks or whole, and in which memory ("device" or "host")."""

    sharded: bool
    home: str = "device"


@dataclass(frozen=True)
class Widths:
    """Bytes of one element: of a parameter in compute dtype, and of all its states (remainder or master, moments)."""

    param: int
    states: int
    group: int = 0  # bytes of states beside, for each ALIGN elements (scales)

    def states_of(self, elements: int) -> int:
        """Bytes of the states of `elements`, a multiple of ALIGN."""
        return elements * self.states + elements // ALIGN * self.group


@dataclass(frozen=True)
class Plan:
    """Placements of parameters, gradients and states for a world size.

    `rows` lists each bucket's layout and widths; the byte methods follow from them alone.
    """

    stage: int
    offload: str | None
    size: int
    params: Placement
    grads: Placement
    states: Placement
    rows: tuple[tuple[Layout, Widths, bool], ...] = ()  # layout, widths, whether it is trained

    def at_rest(self, term: str) -> int:
        """Bytes of one rank that "params", "grads" (after backward, before step) or "states" hold at rest."""
        total = 0
        for layout, width, trained in self.rows:
            placement: Placement = getattr(self, term)
            elements = layout.shard if placement.sharded else layout.numel
            if term == "params":
                total += elements * width.param
            elif trained:
                total += elements * width.param if term == "grads" else width.states_of(elements)
        return total

    @property
    def bytes_at_rest(self) -> dict[str, int]:
        """Bytes at rest of one rank, by term."""
        return {term: self.at_rest(term) for term in TERMS}

    def scatters(self, layout: Layout, width: int) -> bool:
        """Whether a bucket of `width` bytes an element is reduced by the group's own reduce-scatter instead of an exchange."""
        return self.size >= SCATTER_RANKS and layout.shard * width < SCATTER_BYTES

    @property
    def notes(self) -> list[str]:
        """What was chosen by size, and why."""
        small = [layout for layout, width, trained in self.rows if trained and self.scatters(layout, width.param)]
        if not small:
            return []
        return [
            f"{len(small)} bucket(s) are reduced by the process group (reduce-scatter in fp32): at {self.size} ranks their "
            f"slices are smaller than {SCATTER_BYTES >> 10} KiB. The group decides the order of their sums; a larger bucket_mb "
            "avoids it."
        ]

    @property
    def numel(self) -> int:
        """Parameter elements of the whole model that the plan covers, without padding."""
        return sum(layout.used for layout, _, _ in self.rows)

    def __str__(self) -> str:
        head = f"ZeRO stage {self.stage}, offload {self.offload or 'off'}, {self.size} rank(s), {len(self.rows)} bucket(s)"
        lines = [head, f"{'':8}{'rests':>10}{'home':>8}{'bytes a rank':>16}{'a parameter':>13}"]
        for term in TERMS:
            placement = getattr(self, term)
            total = self.at_rest(term)
            lines.append(
                f"{term:8}{'sharded' if placement.sharded else 'whole':>10}{placement.home:>8}{total:>16,}"
                f"{total / max(self.numel, 1):>13.3f}"
            )
        return "\n".join(lines + self.notes)


def make_plan(stage: object, offload: object, size: int) -> Plan:
    """The placements of a ZeRO stage. Raises ValueError for an unknown stage or offload."""
    if stage not in STAGES or isinstance(stage, bool):
        raise ValueError(f"stage: expected 0, 1, 2 or 3, got {stage!r}")
    if offload not in OFFLOADS:
        raise ValueError(f"offload: expected None, 'states' or 'all', got {offload!r}. Did you mean offload='states'?")
    number = int(str(stage))
    if offload == "all" and number < 3:
        raise ValueError(
            f"offload='all' rests parameters on the host, which needs sharded parameters: expected stage=3, got "
            f"stage={number}. Use stage=3 or offload='states'."
        )
    host = "host" if offload else "device"
    return Plan(
        stage=number,
        offload=offload if offload is None else str(offload),
        size=size,
        params=Placement(number >= 3, "host" if offload == "all" else "device"),
        grads=Placement(number >= 2, host),
        states=Placement(number >= 1, host),
    )


def with_rows(plan: Plan, rows: Iterable[tuple[Layout, Widths, bool]]) -> Plan:
    """The same plan for given buckets."""
    return Plan(plan.stage, plan.offload, plan.size, plan.params, plan.grads, plan.states, tuple(rows))
