"""What rests sharded, and where: ZeRO's stages as rows of a table of placements.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020), section 5,
names the stages; offload is the `home` of a placement. This is the only file that knows stage numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from zerolite.backward import FP32, highest, pair, passing, top
from zerolite.layout import ALIGN, Layout
from zerolite.options import check_gradients, check_in_backward, check_resident
from zerolite.parts import arena, part_room
from zerolite.records import Placement, Row, Setting, Term, Widths

STAGES = (0, 1, 2, 3)
OFFLOADS = (None, "states", "all")
TERMS = ("params", "grads", "states")
CHUNK = 4 << 20  # elements of a chunk of states on its way (stream.py): long enough for the full speed of a bus
SLOTS = 2  # chunks on their way at once
TURNS = 2  # rounds of transient gradients that are in flight at once (Reducer._advance)

#: From this many ranks on, a bucket whose slices are smaller than this many bytes is reduced by the group itself: an
#: exchange sends a message to each rank, and small messages are bound by latency.
SCATTER_RANKS = 64
SCATTER_BYTES = 16 << 10


@dataclass(frozen=True)
class Plan:
    """Placements of parameters, gradients and states for a world size.

    `rows` lists each bucket's layout and widths; the byte methods follow from them and the setting alone. The
    formulas of `terms` are written out in docs/plan.md.
    """

    stage: int
    offload: str | None
    size: int
    params: Placement
    grads: Placement
    states: Placement
    rows: tuple[Row, ...] = ()
    setting: Setting = field(default_factory=Setting)
    resident: float = 0.0  # part of the elements whose states stay on the device, though offloaded
    step_in_backward: bool = False  # buckets are updated as they are averaged: gradients do not rest
    reasons: tuple[str, ...] = ()  # why this one was chosen

    def at_rest(self, term: str) -> int:
        """Bytes of one rank that "params", "grads" (after backward, before step) or "states" hold at rest."""
        return self._rests(term, self.rows) + (self._half() if term == "params" else 0)

    def _rests(self, term: str, rows: Iterable[Row]) -> int:
        total = 0
        placement: Placement = getattr(self, term)
        for layout, width, trained, *_ in rows:
            elements = layout.shard if placement.sharded else layout.numel
            if term == "params":
                total += elements * width.param
            elif trained and not (term == "grads" and self.step_in_backward):
                total += elements * width.param if term == "grads" else width.states_of(elements)
        return total

    @property
    def apart(self) -> bool:
        """Whether states rest in another memory than the one that the model computes in."""
        return self.setting.device != "cpu" and self.states.home == "host"

    @property
    def near(self) -> bool:
        """Whether gradients rest on the device, though states rest apart from it."""
        return self.apart and self.grads.home == "device"

    @property
    def leaves(self) -> bool:
        """Whether rounds leave the device as they are averaged."""
        return self.apart and not self.near

    @property
    def publishes(self) -> bool:
        """Whether each rank updates a range of parameters that rest whole, and all ranks then get it."""
        return self.states.sharded and not self.params.sharded

    def _half(self) -> int:
        """Compute-dtype parameters on the host: an update needs them beside the states, and they are what travels back."""
        if not self.apart or self.params.home == "host":
            return 0
        return sum(self._range(row) * row.widths.param for row in self.trained if not row.kept)

    @property
    def bytes_at_rest(self) -> dict[str, int]:
        """Bytes at rest of one rank, by term."""
        return {term: self.at_rest(term) for term in TERMS}

    @property
    def trained(self) -> list[Row]:
        """Buckets with gradients and states."""
        return [row for row in self.rows if row.trained]

    def _range(self, row: Row) -> int:
        """Elements that one rank updates."""
        return row.layout.shard if self.states.sharded else row.layout.numel

    # ---- a step's peak

    @functools.cached_property
    def terms(self) -> list[Term]:
        """Every use of memory, at rest and within a step."""
        found = [self._params()]
        if self.setting.beside:
            found.append(self._term("buffers, frozen", "always", "device", self.setting.beside))
        if self._half():
            found.append(self._term("host half", "always", "host", self._half()))
        for kept in (False, True) if self.apart else (False,):
            rows = [row for row in self.trained if row.kept == kept]
            home = "device" if kept else self.states.home
            master = sum(self._range(row) * row.widths.rest for row in rows)
            if rows:
                found.append(self._term("master" + " kept" * kept, "always", home, master))
                found.append(self._term("moments" + " kept" * kept, "always", home, self._rests("states", rows) - master))
                near = "device" if kept else self.grads.home
                found.append(self._term("gradients" + " kept" * kept, "always", near, self._rests("grads", rows)))
        found += self._transient()
        if self.setting.activations is not None:
            found.append(self._term("activations", "backward", "device", self.setting.activations))
        return found

    def _term(self, name: str, when: str, home: str, rank: int) -> Term:
        return Term(name, when, "host" if self.setting.device == "cpu" else home, rank, rank * self.setting.here)

    def _params(self) -> Term:
        term = self._term("parameters", "always", self.params.home, self._rests("params", self.rows))
        once = self.setting.shared and self.publishes  # Home: once a host
        return term._replace(host=term.rank) if once else term

    def _transient(self) -> Iterator[Term]:
        buckets = [row.full for row in reversed(self.trained)]  # in the order in which they go out
        if self.setting.micro_batches > 1:
            yield self._term("sums of micro-batches", "always", self.grads.home, self._sums(False))
            if self._sums(True):
                yield self._term("sums of micro-batches kept", "always", "device", self._sums(True))
        if self.grads.sharded:
            yield from self._in_flight(buckets)
        else:
            # as autograd gave them, beside the packed copy that rests; all copies stay from step to step in shared memory
            filling = top(buckets) if self.setting.shared else top(buckets[-1:])
            yield self._term("buckets in flight", "backward", "device", max(filling, self._at_the_last_backward(buckets)))
            yield self._term("exchange", "step", self.grads.home, self._at_the_step(buckets))
        if self.params.sharded and not self.once:
            yield self._term("units in use", "backward", "device", highest(self).units)
        if self.apart:
            yield from self._crossing()

    def _crossing(self) -> Iterator[Term]:
        """What states on the host need on their way: rounds that leave the device, later ones that are added, chunks."""
        away = [row for row in self.trained if not row.kept]
        ranges = [row.layout.shard * row.widths.param for row in away]
        yield from self._fed(away) if self.near else self._leaving(away, ranges)
        if not self.states.sharded and not self.alone:  # each bucket's, until it is updated
            widths = [FP32 if self.setting.micro_batches > 1 else row.widths.param for row in away]
            whole = sum(row.layout.numel * width for row, width in zip(away, widths, strict=True))
            yield self._term("whole gradients", "step", self.grads.home, whole)
        if self.setting.stream and away:
            widest = max(row.widths.param * (1 if self.near else 2) + row.widths.states for row in away)
            longest = min(max(self._range(row) for row in away), CHUNK)
            yield self._term("chunks of states", "step", "device", SLOTS * (longest * widest + longest // ALIGN * 2))

    def _fed(self, away: Sequence[Row]) -> Iterator[Term]:
        """Slots for gradients that rest on the device, on their way to an update on the host."""
        wide = self.setting.micro_batches > 1
        slots = [min(self._range(row), self.setting.feed) * (FP32 if wide else row.widths.param) for row in away]
        yield self._term("slots of gradients", "always", "host", TURNS * top(slots))

    def _leaving(self, away: Sequence[Row], ranges: list[int]) -> Iterator[Term]:
        """Rounds that leave the device as they are averaged."""
        if self.setting.slots:  # packed parts, and slots for them; later rounds are added where they are read
            room = part_room(self.size, _sizes(away))
            yield self._term("slots of rounds", "always", "host", arena(self.size, _sizes(away)))
            yield self._term("rounds on their way", "always", "device", TURNS * room)
            return
        yield self._term("rounds on their way", "backward", "device", highest(self).leaving)
        if self.setting.micro_batches > 1:
            yield self._term("later rounds", "always", "host", TURNS * top(ranges))

    @property
    def once(self) -> bool:
        """Whether a host's ranks hold all parameters in one home, so that a gather copies nothing."""
        return self.setting.shared and self.setting.here == self.size

    def _sums(self, kept: bool | None = None) -> int:
        """Averages of earlier rounds, fp32 from the second on; where gradients rest sharded they replace those of one round.

        kept  of the rows whose states stay on the device, of the others, or (None) of all
        """
        read = self.setting.shared and self.setting.clip  # for a norm every round is added, though its slots stay
        wide = self.grads.sharded or read or self.setting.micro_batches > 2
        total = 0
        for row in self.trained:
            if kept is None or row.kept == kept:
                replaced = self.grads.sharded and (row.kept or self.near or not self.apart)
                total += row.layout.shard * ((FP32 if wide else row.widths.param) - row.widths.param * replaced)
        return total

    def _in_flight(self, buckets: Sequence[int]) -> Iterator[Term]:
        """Buckets between autograd and the average, where rounds go out as they are complete."""
        if self.setting.shared and not self.alone:
            yield self._term("shared arena", "always", "host", arena(self.size, _sizes(self.trained)))
        if self.params.sharded or self.leaves:
            flight = highest(self).flight
        elif self.alone:
            # a further round is a tensor of its own; where its average grows to fp32 by it, that is counted already
            rounds = self.setting.micro_batches
            packed = [row.full for row in self.trained if not row.unpacked or rounds > 1]
            flight = top(packed) * (2 if rounds > 2 or (rounds > 1 and not self._sums()) else 1)
        else:  # the bucket that is being filled, or the round being averaged and the next one: what was packed, and the slices
            flight = top(buckets) + self._far(buckets) if self.setting.shared else 2 * pair(buckets)
        yield self._term("buckets in flight", "backward", "device", flight)

    def _at_the_step(self, buckets: Sequence[int]) -> int:
        """Slices that come from other ranks, where gradients rest whole; or, where states do, one bucket's whole average."""
        whole = 0
        if self.alone:  # the average is the gradient itself
            return 0
        if not self.states.sharded:
            widths = [FP32 if self.setting.micro_batches > 1 else row.widths.param for row in self.trained]
            whole = top([row.layout.numel * width for row, width in zip(self.trained, widths, strict=True)])
            whole += whole // self.size
            if self.setting.clip and not self.setting.shared:  # every round has gone out: all averages, no packed copy
                averages = sum(row.layout.shard * width for row, width in zip(self.trained, widths, strict=True))
                sums = self._sums() if self.setting.micro_batches > 1 else 0
                whole += averages - sums - self.at_rest("grads")
        return max(self._slices(buckets, self.setting.micro_batches, self.setting.clip), whole)

    def _at_the_last_backward(self, buckets: Sequence[int]) -> int:
        """Slices, where gradients rest whole: the round before goes out as the last backward begins, while all that autograd
        saved is held. Less the sums that this round begins or widens, which are not there yet."""
        rounds = self.setting.micro_batches
        if rounds < 2 or self.alone:
            return 0
        narrow = sum(row.layout.shard * row.widths.param for row in self.trained)
        there = 0 if rounds == 2 else narrow if rounds == 3 else self._sums()
        return self._slices(buckets, rounds - 1, True) - (self._sums() - there)

    def _slices(self, buckets: Sequence[int], number: int, outward: bool) -> int:
        """The most that round `number` takes as it goes out (outward), or as buckets are updated, in forward order."""
        if self.setting.shared:
            return self._far(buckets)
        rows = list(reversed(self.trained)) if outward else self.trained
        new = [row.layout.shard * {1: row.widths.param, 2: FP32 - row.widths.param}.get(number, 0) for row in rows]
        return passing([row.full for row in rows], new)

    def _far(self, buckets: Sequence[int]) -> int:
        """Slices to and from ranks of other hosts: two buckets, sent and received."""
        return 2 * pair(buckets) * (self.size - self.setting.here) // self.size

    @property
    def alone(self) -> bool:
        """Whether there is one rank: nothing moves."""
        return self.size == 1

    def used(self, home: str, peak: bool = True, host: bool = False) -> int:
        """Bytes on "device" or "host" of one rank, or of all ranks of one host; at the peak of a step, or at rest."""
        total = dict.fromkeys(("always", "backward", "step"), 0)
        for term in self.terms:
            if term.home == home:
                total[term.when] += term.host if host else term.rank
        return total["always"] + (max(total["backward"], total["step"]) if peak else 0)

    @property
    def bytes_peak(self) -> dict[str, int]:
        """Bytes of one rank at the peak of a step, by memory ("device", "host"; on a CPU all is host memory)."""
        return {home: self.used(home) for home in ("device", "host")}

    @property
    def host_peak(self) -> int:
        """Bytes of host memory of all ranks of one host at the peak of a step."""
        return self.used("host", host=True)

    def scatters(self, layout: Layout, width: int) -> bool:
        """Whether a bucket of `width` bytes an element is reduced by the group's own reduce-scatter instead of an exchange."""
        return self.size >= SCATTER_RANKS and layout.shard * width < SCATTER_BYTES

    @property
    def notes(self) -> list[str]:
        """What was chosen, by speed or by size, and why."""
        small = [row for row in self.trained if self.scatters(row.layout, row.widths.param)]
        if not small:
            return list(self.reasons)
        return [
            *self.reasons,
            f"{len(small)} bucket(s) are reduced by the process group (reduce-scatter in fp32): at {self.size} ranks their "
            f"slices are smaller than {SCATTER_BYTES >> 10} KiB. The group decides the order of their sums; a larger bucket_mb "
            "avoids it.",
        ]

    @property
    def numel(self) -> int:
        """Parameter elements of the whole model that the plan covers, without padding."""
        return sum(layout.used for layout, *_ in self.rows)

    def __str__(self) -> str:
        head = f"ZeRO stage {self.stage}, offload {self.offload or 'off'}, {self.size} rank(s), {len(self.rows)} bucket(s)"
        lines = [head, f"{'':8}{'rests':>10}{'home':>8}{'bytes a rank':>16}{'a parameter':>13}"]
        for term in TERMS:
            placement = getattr(self, term)
            total = self.at_rest(term)
            lines.append(
                f"{term:8}{'sharded' if placement.sharded else 'whole':>10}"
                f"{'host' if self.setting.device == 'cpu' else placement.home:>8}{total:>16,}"
                f"{total / max(self.numel, 1):>13.3f}"
            )
        rank = " + ".join(f"{value:,} on the {home}" for home, value in self.bytes_peak.items() if value)
        lines.append(f"peak of a step: {rank} a rank; {self.host_peak:,} of host memory for {self.setting.here} rank(s) a host")
        return "\n".join(lines + self.notes)

    def changes(self, other: Plan) -> int:
        """How many of stage, offload and (with the same offload) the gradients' home another plan changes."""
        same, other_way = self.offload == other.offload, self.step_in_backward != other.step_in_backward
        return (self.stage != other.stage) + (not same) + (same and self.grads.home != other.grads.home) + other_way

    @property
    def label(self) -> str:
        """Stage and offload in words."""
        near = ", gradients='device'" if self.offload and self.grads.home == "device" else ""
        near += ", step_in_backward=True" * self.step_in_backward
        return f"stage {self.stage}" + (f", offload={self.offload!r}" if self.offload else "") + near


__all__ = ["Placement", "Plan", "Row", "Setting", "Term", "Widths", "choices", "make_plan", "with_rows"]


def _sizes(rows: Sequence[Row]) -> list[tuple[int, int]]:
    return [(row.layout.shard, row.widths.param) for row in rows]


def choices(offload: object, device: str, whole: bool, in_backward: bool = False) -> list[tuple[int, str | None]]:
    """Stages and offloads that are alternatives, for a given offload or (True) for all (on a CPU, where nothing moves, none).

    whole  parameters cannot be sharded: there is no model; in_backward: only what can be updated there
    """
    if in_backward:  # the plan says why, where there is no model or an offload was asked for
        return [(STAGES[-1], None if offload is True else str(offload) if offload else None)]
    offloads: Sequence[str | None] = OFFLOADS if device != "cpu" else (None,)
    if offload is not True:
        offloads = [offload if offload is None else str(offload)]
    found = [(stage, way) for stage in STAGES for way in offloads]
    return [(stage, way) for stage, way in found if not (way == "all" and stage < 3) and not (whole and stage == 3)]


def make_plan(
    stage: object,
    offload: object,
    size: int,
    resident: object = 0.0,
    gradients: object = "auto",
    step_in_backward: object = False,
) -> Plan:
    """The placements of a ZeRO stage. Raises ValueError for options that do not exist or do not go together.

    gradients "auto" means "host" here: whether there is room on the device is for the planner to say.
    """
    if stage not in STAGES or isinstance(stage, bool):
        raise ValueError(f"stage: expected 0, 1, 2 or 3, got {stage!r}. Or stage='auto', the fastest that fits.")
    if offload not in OFFLOADS:
        raise ValueError(f"offload: expected None, 'states' or 'all', got {offload!r}. Did you mean offload='states'?")
    number = STAGES.index(stage)  # type: ignore[arg-type]  # 2.0 is one, and a tensor of 2
    if offload == "all" and number < 3:
        raise ValueError(
            f"offload='all' rests parameters on the host, which needs sharded parameters: expected stage=3, got "
            f"stage={number}. Use stage=3 or offload='states'."
        )
    check_in_backward(step_in_backward, number >= 3, stage, offload)
    part = check_resident(resident, offload)
    check_gradients(gradients, offload)
    host = "host" if offload else "device"
    # offloaded gradients leave the device as they are averaged, at every stage, so they rest sharded
    return Plan(
        stage=number,
        offload=offload if offload is None else str(offload),
        size=size,
        params=Placement(number >= 3, "host" if offload == "all" else "device"),
        grads=Placement(number >= 2 or host == "host", "device" if gradients == "device" else host),
        states=Placement(number >= 1, host),
        resident=part,
        step_in_backward=bool(step_in_backward),
    )


def with_rows(plan: Plan, rows: Iterable[tuple], setting: Setting | None = None, names: Iterable[str] = ()) -> Plan:
    """The same plan for given buckets: (layout, widths, trained) or Row each; `names` are all parameters' in their order."""
    made, at = [Row(*row) for row in rows], {name: number for number, name in enumerate(names)}
    first = min((at[slot.name] for row in made if row.unit for slot in row.layout.slots), default=len(at))
    for k, row in enumerate(made):
        if not row.unit and at:
            early = sum(slot.numel for slot in row.layout.slots if at.get(slot.name, -1) > first)
            made[k] = row._replace(early=early)
    return replace(plan, rows=tuple(made), setting=plan.setting if setting is None else setting)
