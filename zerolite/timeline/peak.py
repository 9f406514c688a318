"""Why the peak is what it is, and what would lower it: rules over the terms, no measurement of its own."""

from __future__ import annotations

from dataclasses import dataclass

from zerolite.memory import NAMES
from zerolite.timeline.record import TERMS, Recording, Sample, amount

_SMALL, _PART = 0.05, 0.25  # of the peak, and of what is above the plan: what saves less than both is not worth a line
_VERBS = {
    "gather": "bucket '{}' was gathered",
    "release": "bucket '{}' was released",
    "pack": "bucket '{}' was packed: the arrived gradients and their copy are both held",
    "exchange": "bucket '{}' was exchanged",
    "average": "bucket '{}' was averaged: its round and the average are both held",
    "update": "bucket '{}' was updated",
    "publish": "bucket '{}' was published",
}


@dataclass(frozen=True)
class Peak:
    """The highest sample, explained."""

    sample: Sample
    lines: list[str]  # sentences: what, made of what, against the plan, the largest items
    cures: list[str]  # the most effective first; may be empty

    @property
    def text(self) -> str:
        """All in one paragraph."""
        return " ".join(self.lines)


def explain(recording: Recording) -> Peak:
    """Explains the highest sample of a recording that has one."""
    sample = recording.highest
    assert sample is not None
    terms = dict(zip(TERMS, sample.terms, strict=True))
    parts = [f"{NAMES[term]} {amount(value)}" for term, value in terms.items() if value]
    verb = f"when {_VERBS[sample.event].format(sample.name)}" if sample.event in _VERBS else f"at '{sample.label}'"
    where = f"{'the time between phases' if sample.phase == 'other' else sample.phase}, {verb}"
    lines = [
        f"Peak of live bytes: {amount(sample.live)}, {sample.seconds:.3f} s after the start, in {where}.",
        f"It is made of {_listed(parts)}.",
        _against_the_plan(recording, terms, sample.live),
    ]
    largest = largest_items(recording.at_peak)
    if largest:
        shown = [f"'{name}' {amount(value)} ({NAMES[term]})" for name, term, value in largest]
        lines.append(f"Largest items: {_listed(shown)}.")
    found = sorted(_cures(recording, terms), reverse=True)
    enough = min(_SMALL * sample.live, _PART * max(sample.live - recording.rest, 1))
    cures = [cure for saved, cure in found if saved > 0 and saved >= enough]
    return Peak(sample, lines, cures)


def largest_items(at_peak: dict[str, dict[str, int]], count: int = 4) -> list[tuple[str, str, int]]:
    """(bucket, term, bytes) of what held most; of equals first what does not rest."""
    items = [(name, term, value) for name, terms in at_peak.items() for term, value in terms.items() if value]
    return sorted(items, key=lambda item: (-item[2], -TERMS.index(item[1])))[:count]


def _against_the_plan(recording: Recording, terms: dict[str, int], live: int) -> str:
    above = {term: value - recording.planned[term] for term, value in terms.items()}
    more = [f"{NAMES[term]} {amount(value)}" for term, value in above.items() if value > 0]
    less = [f"{NAMES[term]} {amount(-value)}" for term, value in above.items() if value < 0]
    sign = "above" if live >= recording.rest else "below"
    text = f"That is {amount(abs(live - recording.rest))} {sign} the {amount(recording.rest)} that the plan rests at"
    text += f": more {_listed(more)}" if more else ""
    text += f"{';' if more else ':'} less {_listed(less)}" if less else ""
    return text + "."


def _cures(recording: Recording, terms: dict[str, int]) -> list[tuple[float, str]]:
    """(bytes saved, what to do); an estimate is said to be one."""
    sizes, options = recording.sizes, recording.options
    found: list[tuple[float, str]] = []
    others = 1 - 1 / sizes["ranks"]
    for term, option in (("states", "stage=1 or higher"), ("grads", "stage=2 or higher"), ("params", "stage=3")):
        if options[f"{term} whole"]:
            held = terms["master"] + terms["moments"] if term == "states" else terms[term]
            found.append((held * others, f"{option} cuts {term} over the ranks: about {amount(held * others)} less."))
    moving = terms["flight"] + terms["kept"]
    below = min(options["bucket_mb"], sizes["largest bucket"] / 2**20)  # what cuts a bucket
    if sizes["largest bucket"] > 1.01 * sizes["largest parameter"]:  # else it is one parameter and padding, which is never cut
        found.append(
            (
                moving / 2,
                f"a bucket_mb below {below:.3g} (now {options['bucket_mb']:g}): {amount(moving)} are buckets in flight and "
                f"slots kept for them, of up to {amount(sizes['largest bucket'])} a bucket; half the size holds about half.",
            )
        )
    if terms["units"] and len(recording.at_peak) > 1:
        name, value = max(((name, held.get("units", 0)) for name, held in recording.at_peak.items()), key=lambda item: item[1])
        found.append(
            (
                terms["units"] / 2,
                f"units=(smaller module classes): whole units hold {amount(terms['units'])}, '{name}' alone {amount(value)}.",
            )
        )
    saved = {f"moments='{name}'": terms["moments"] * (1 - width) for name, width in options["moments"].items()}
    if saved:
        less = " or ".join(amount(value) for value in saved.values())
        found.append((max(saved.values()), f"{' or '.join(saved)} rounds Adam's moments: {less} less."))
    if options["states on device"]:
        held = terms["master"] + terms["moments"]
        found.append((held, f"offload='states' rests states on the host: {amount(held)} less on the device."))
    return found


def _listed(parts: list[str]) -> str:
    return " and ".join(parts) if len(parts) < 3 else ", ".join(parts[:-1]) + " and " + parts[-1]
