"""How step time and memory of one CPU host's ranks follow their number: fitted to some worlds, checked on the one left out.

N ranks on c cores (T: seconds of a step, M: bytes of all ranks together):

    T(N) = crowd(N) (compute(N) + overhead(N))
    compute(N)  = A N/c + B max(1, N/c)    every rank's work shares the cores; what one thread of a rank does alone does not
    overhead(N) = U u(N) + X (N - 1)       u = 1 where states are sharded (each element is updated once), N where not;
                                           N - 1 times the parameters' bytes travel, on all ranks together
    the same of zerolite = U u(N) (24 + 2 N)/26   nothing travels in shared memory: the update reads each rank's gradient
    crowd(N)    = K where N > c, else 1    what more ranks than cores lose to each other
    M(N) = R N + S                         what each rank has, and what they hold once between them
    the same of zerolite = base(N) + plan(N) + R N    processes before the model; zerolite.plan()'s bytes; activations

A and B come from "model alone", U and X from a system's overheads, R and S from its memory; none but R of zerolite can be
negative. Each is fitted with the other worlds alone, and predicts the world that was left out. K is the machine's: the median
of what "model alone" of the *other* models took at worlds above c, of what their smaller worlds predict; 1 where there are
none. Worlds that all fill the cores cannot tell B from A: from those alone, a smaller world is predicted as if its threads
scaled perfectly (B = 0).

X is no constant of the machine's: from 2 to 4 ranks on two cores gloo's exchanges took 2.2 to 3.3 times as long, by these
formulas, where the bytes say 3. So where OTHERS other models were measured with the same system, its step grows as theirs
did, whatever the reason:

    T(N) = mean over the known n of T(n) x median over the other models of T'(N)/T'(n)        (geometric mean)

all of one processor: rows of other models at the same world are used, none of the model itself. docs/benchmarks.md says how
many of all predictions lie within 10 %.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import Row, quantile
from benchmarks.systems import ALONE

TOLERANCE = 0.10  # of a prediction of a world that was left out
MEMORY = ("peak", "rest")
OTHERS = 3  # models from which on a system's growth with ranks is learnt, not computed
At = dict[int, Row]  # by ranks


def fit(features: list[list[float]], values: list[float]) -> list[float]:
    """The least squares of relative errors in coefficients that are not negative: the best over which of them are used."""
    import torch

    width = len(features[0])
    best: tuple[float, list[float]] = (float("inf"), [0.0] * width)
    rows = [[x / max(abs(v), 1e-12) for x in line] for line, v in zip(features, values, strict=True)]
    for mask in range(1, 1 << width):
        used = [k for k in range(width) if mask >> k & 1]
        a = torch.tensor([[line[k] for k in used] for line in rows], dtype=torch.float64)
        b = torch.tensor([1.0 if v > 0 else 0.0 for v in values], dtype=torch.float64)
        solved = torch.linalg.lstsq(a, b[:, None], driver="gelsd").solution[:, 0]
        error = float((a @ solved - b).square().sum())
        if bool((solved >= 0).all()) and error < best[0] - 1e-15:
            full = [0.0] * width
            for k, value in zip(used, solved.tolist(), strict=True):
                full[k] = value
            best = (error, full)
    return best[1]


def line(features: list[list[float]], values: list[float], here: list[float]) -> float:
    """What a fit to `values` predicts at `here`."""
    return sum(c * x for c, x in zip(fit(features, values), here, strict=True))


# ---- seconds


def compute_features(world: int, cores: int) -> list[float]:
    return [world / cores, max(1.0, world / cores)]


def overhead_features(world: int, system: str) -> list[float]:
    updates = 1.0 if sharded(system) else float(world)
    return [updates * (24 + 2 * world) / 26] if ours(system) else [updates, world - 1.0]


def ours(system: str) -> bool:
    return system.startswith("zerolite")


def sharded(system: str) -> bool:
    """Whether an element's states are on one rank only."""
    return not (system.startswith("DDP") or system.endswith(" 0") or system == ALONE)


def computed(alone: At, known: Sequence[int], world: int, cores: int) -> float:
    """Seconds of forward and backward at `world`, by those at the `known` worlds, where ranks do not crowd."""
    features = [compute_features(n, cores) for n in known]
    return line(features, [alone[n]["step"] for n in known], compute_features(world, cores))


def crowding(alone: dict[str, At], model: str, cores: int) -> float:
    """K, by the models other than `model` that were measured at worlds on both sides of the number of cores."""
    found = []
    for name, at in alone.items():
        few = [n for n in at if n <= cores]
        if name != model and len(few) >= 2:
            found += [at[n]["step"] / computed(at, few, n, cores) for n in at if n > cores]
    return quantile(found, 0.5) if found else 1.0


def seconds(at: At, alone: At, world: int, known: Sequence[int], cores: int, crowd: float) -> float:
    """A step at `world` from the rows at the `known` worlds."""

    def apart(n: int) -> float:
        return crowd if n > cores else 1.0

    system = at[known[0]]["system"]
    quiet = {n: {"step": alone[n]["step"] / apart(n)} for n in known}
    step = computed(quiet, known, world, cores)
    if system != ALONE:
        over = [at[n]["overhead"] / apart(n) for n in known]
        step += line([overhead_features(n, system) for n in known], over, overhead_features(world, system))
    return step * apart(world)


def grown(others: list[At], at: At, world: int, known: Sequence[int]) -> float:
    """A step at `world` from the rows at the `known` worlds, by the growth that `others` (the same system's rows on other
    models) had."""
    ratios = [quantile([other[world]["step"] / other[n]["step"] for other in others], 0.5) for n in known]
    return math.prod(at[n]["step"] * ratio for n, ratio in zip(known, ratios, strict=True)) ** (1 / len(known))


# ---- bytes


@functools.cache
def question(shape: str, world: int, in_backward: bool = False) -> Any:
    """What zerolite is asked about this shape (JSON) at this world, on one host."""
    import torch

    from benchmarks.models import Shape
    from zerolite.planner import question_of

    with torch.device("meta"):
        model = Shape(**json.loads(shape)).build()
    return question_of(model, world=world, param_dtype=torch.bfloat16, step_in_backward=in_backward)[0]


def planned(row: Row, world: int, name: str) -> float:
    """Bytes of all ranks of zerolite's plan for a row's system at a world.

    After a step without another backward, gradients rest in shared memory only: elsewhere zero_grad() gave them back.
    """
    options = {"offload": None, "moments": "fp32"} | row["settings"]
    stage, offload = options["stage"], options["offload"]
    if stage == "auto":  # the plan that it chose, as it is shown
        chosen = re.match(r"stage (\d)(?:, offload='(\w+)')?", options["chosen"])
        assert chosen is not None, options["chosen"]
        stage, offload = int(chosen[1]), chosen[2]
    asked = question(json.dumps(row["shape"]), world, options.get("step_in_backward", False))
    plan = asked.plan(stage, offload, options["moments"])
    if name == "peak":
        return sum(plan.used(home, host=True) for home in ("device", "host"))
    kept = [term for term in plan.terms if term.when == "always" and (plan.setting.shared or term.name != "gradients")]
    return sum(term.host for term in kept)


def memory(at: At, world: int, known: Sequence[int], name: str) -> float:
    """Bytes of all ranks at `world`, at the peak or at rest, from the rows at the `known` worlds."""
    ends = [[float(n), 1.0] for n in known]
    first = at[known[0]]
    if not ours(first["system"]) or "shape" not in first:
        return line(ends, [at[n][name] for n in known], [world, 1.0])
    each = [(at[n][name] - at[n]["base"] - planned(at[n], n, name)) / n for n in known]
    base = line(ends, [at[n]["base"] for n in known], [world, 1.0])
    like = at[max((n for n in known if n < world), default=min(known))]  # "auto" chooses by the number of ranks
    return base + planned(like, world, name) + world * sum(each) / len(each)


# ---- all of them


def calibrate(rows: list[Row]) -> list[Row]:
    """For each model and system that one processor measured at three worlds or more: each world predicted from the others."""
    groups: dict[tuple[str, str, str], At] = {}
    for row in rows:
        if row["benchmark"] == "step" and "rest" in row:
            groups.setdefault((row["conditions"]["cpu"], row["model"], row["system"]), {})[row["ranks"]] = row
    found: list[Row] = []
    for (cpu, model, system), at in groups.items():
        alone = {name: one for (host, name, what), one in groups.items() if (host, what) == (cpu, ALONE)}
        worlds = sorted(set(at) & set(alone.get(model, {})))
        others = [
            one
            for (host, name, what), one in groups.items()
            if (host, what) == (cpu, system) and name != model and one.keys() >= at.keys()
        ]
        learnt = len(others) >= OTHERS
        for world in worlds if len(worlds) >= 3 else []:
            known = [n for n in worlds if n != world]
            cores = at[world]["conditions"]["cores"]
            crowd = crowding(alone, model, cores)
            step = grown(others, at, world, known) if learnt else seconds(at, alone[model], world, known, cores, crowd)
            guess = {"step": step}
            guess |= {name: memory(at, world, known, name) for name in MEMORY}
            errors = {name: value / at[world][name] - 1 for name, value in guess.items()}
            row = {"benchmark": "scale", "kind": "calibration", "cpu": cpu, "model": model, "system": system}
            row |= {"ranks": world, "known": known, "crowd": crowd, "learnt": learnt, "predicted": guess, "errors": errors}
            found.append({**row, "measured": {name: at[world][name] for name in guess}})
    return found
