"""Why targets are missed, as far as stored figures tell: bytes that rest, passes over memory, construction."""

from __future__ import annotations

from benchmarks.harness import Row
from benchmarks.models import SMALL
from benchmarks.targets import ABOVE, DEEPSPEED, PEAK, Target, best, of_steps


def of_block(rows: list[Row], passes: list[Row], update: list[Row]) -> str:
    """A line for each kind of target that is missed in one model at one world size; empty where none is."""
    targets = of_steps(rows)
    late = [target for target in targets if not target.met]
    known = {row["system"]: row for row in rows if row["benchmark"] == "step"}
    if not late or "model alone" not in known:
        return ""
    lines = [overhead(targets, known, passes, update), memory(late, known), first(late, known)]
    found = [f"- {line}" for line in lines if line]
    return "\nReasons, as far as found:\n\n" + "\n".join(found) + "\n" if found else ""


def names_of(late: list[Target], metric: str) -> list[str]:
    """Systems that miss a target of a figure, each once."""
    return list(dict.fromkeys(target.system for target in late if target.metric == metric))


def overhead(targets: list[Target], known: dict[str, Row], passes: list[Row], update: list[Row]) -> str:
    """At several ranks the passes over gradients and states at their measured rates; at one rank the bytes of states."""
    names = names_of([target for target in targets if not target.met], "overhead")
    if not names:
        return ""
    one = known[names[0]]
    if one.get("shape", {}).get("kind") == "small":
        return each(known, names, targets)
    if one["ranks"] == 1:
        ddp = best(list(known.values()), "overhead", "DDP")
        if ddp is None:
            return ""
        alone, own = known["model alone"]["bytes_a_parameter"], ddp["bytes_a_parameter"]
        ours = ", ".join(f"{name} {known[name]['bytes_a_parameter'] - alone:.1f}" for name in names)
        return (
            f"overhead: at one rank nothing is exchanged, and the update's bytes decide. {ddp['system']} keeps no fp32 master "
            f"of bf16 parameters, and its moments in bf16: {own - alone:.1f} bytes of states a parameter; {ours} (gradients "
            "that stay included)"
        )
    same = [row for row in passes + update if processor(row) == processor(one)]
    rates = {row["side"]: row["ns"][1] for row in same}
    sides = ("pack", "average of 2 and its square sum", "square sum of 2", "zerolite", f"zerolite, {one['ranks']} sources")
    if any(side not in rates for side in sides):
        return ""  # the tables above are of another processor
    ranks, size = one["ranks"], one["numel"] * 1e-6  # ms for each ns
    # Each rank packs all of its gradients, and averages come from `ranks` sources instead of 2 (by bytes).
    scaled = (ranks, (ranks + 1) / 3, ranks / 2, 1, 1)
    pack, average, norm, adam, summing = (rates[side] * scale * size for side, scale in zip(sides, scaled, strict=True))
    peers = {t.peer["system"]: t.peer["overhead"] for t in targets if t.bound == DEEPSPEED and t.system in names}
    bounds = [f"{name}'s sixth is {value * DEEPSPEED * 1e3:.0f}" for name, value in peers.items()]
    return (
        f"overhead: at the rates of the tables above packing {pack:.0f} ms, averaging with the exact norm {average:.0f} and "
        f"the update {adam:.0f} take {pack + average + adam:.0f} ms on these cores at stages 2 and 3; at stage 1, which "
        f"averages inside norm and update, packing, the norm ({norm:.0f}) and the update "
        f"({summing:.0f}) {pack + norm + summing:.0f}; "
        f"{', '.join(bounds)}. What was just written passes faster; the rest is waiting for the slowest rank"
    )


def processor(row: Row) -> tuple[str, int] | None:
    """What a row was measured on."""
    conditions = row.get("conditions")
    return (conditions["cpu"], conditions["cores"]) if conditions else None


def each(known: dict[str, Row], names: list[str], targets: list[Target]) -> str:
    """With thousands of small parameters: what one costs."""
    peers = dict.fromkeys(t.peer["system"] for t in targets if t.metric == "overhead" and t.system in names)
    count = known[names[0]]["shape"]["layers"] * SMALL
    told = ", ".join(f"{name} {known[name]['overhead'] / count * 1e6:.1f}" for name in (*names, *peers))
    alone = known["model alone"]["step"] / count * 1e6
    return (
        f"overhead: {count:,} parameters cost what Python and autograd do for each, not their bytes. Microseconds a parameter "
        f"beyond the {alone:.1f} of model alone: {told}. Of zerolite's, a part is the call of a hook, with "
        "p.grad read and set; most of the rest is torch's clip_grad_norm_, in which torch lists and groups every p.grad "
        "twice and stacks their norms, as for plain tensors (`optimizer.clip_grad_norm_` does not)"
    )


def memory(late: list[Target], known: dict[str, Row]) -> str:
    """What rests, and what the model's own step takes beside its parameters: about the least that a peak can be."""
    alone, told = known["model alone"], []
    step = alone[ABOVE] - alone["bytes_a_parameter"]
    for target in late:
        if target.metric == ABOVE:
            name, bound = target.system, target.peer[ABOVE] * PEAK
            rest = known[name]["bytes_a_parameter"]
            told.append(
                f"{name} {rest:.1f} + {step:.1f} = {rest + step:.1f} (peak {known[name][ABOVE]:.1f}, bound {bound:.1f})"
            )
    if not told:
        return ""
    return (
        "peak memory, bytes a parameter and rank: what rests, and what the model alone takes beside its parameters at its own "
        f"peak (activations, gradients): {'; '.join(told)}"
    )


def first(late: list[Target], known: dict[str, Row]) -> str:
    """How much of the first step is construction."""
    told = []
    for name in names_of(late, "first"):
        row = known[name]
        told.append(f"{name} {row['build'] * 1e3:.0f} of {row['first'] * 1e3:.0f} ms" if "build" in row else name)
    end = "the rest is the step, whose memory is touched for the first time"
    return f"first step: of it construction {', '.join(told)}; {end}" if told else ""
