"""The plan of a ZeroOptimizer about to be built: stage "auto", and the refusal of what cannot fit on these hosts."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from zerolite.buffer import device_memory, linked
from zerolite.comm import Comm
from zerolite.comm.group import GroupComm
from zerolite.comm.pinned import by_memory
from zerolite.host import identity as host_identity
from zerolite.host import usable_memory
from zerolite.options import feed_size, is_auto
from zerolite.partition import device_of, names_of
from zerolite.placement import Plan, Setting
from zerolite.planner import DoesNotFit, Limits, Question, choose


def settle(
    optimizer: Any, model: nn.Module | None, options: dict[str, Any], comm: Comm
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The options with stage "auto" replaced, and why (a collective: rank 0's rates and choice count for all).

    Raises DoesNotFit on every rank: for "auto" where nothing fits in the memory that is free now, for a given stage where
    it needs more than its host has in all.
    """
    left = [name for name in ("stage", "resident", "gradients") if is_auto(options[name])]  # to the plan
    if options["offload"] != "states" and "gradients" in left:
        left.remove("gradients")
    free, total = usable_memory()
    params = list(model.parameters()) if isinstance(model, nn.Module) else []
    held = sum(p.numel() * p.element_size() for p in params if not (p.is_meta or p.is_cuda))
    fast = linked(device_of(params), comm.size)
    facts = comm.share((host_identity(), free, total, held, fast), "set-up memory")
    outcome: tuple[str, Any, tuple[str, ...]] | None = None
    if comm.rank == 0:
        try:
            chosen = _decide(optimizer, model, options, comm, facts)
            found = {"stage": chosen.stage, "resident": chosen.resident, "gradients": chosen.grads.home}
            outcome = ("chosen", found, chosen.reasons)
        except DoesNotFit as error:
            outcome = ("refused", str(error), ())
        except Exception as error:  # build() says it better; "auto" cannot go on
            outcome = ("failed", f"{error}", ()) if set(left) - {"gradients"} else None
    outcome = comm.share(outcome, "set-up plan")[0]
    if outcome is not None and outcome[0] == "refused":
        raise DoesNotFit(outcome[1])
    if outcome is not None and outcome[0] == "failed":  # also where this rank has other options than rank 0
        raise ValueError(f"stage='auto': {outcome[1]}" if is_auto(options["stage"]) else f"on rank 0: {outcome[1]}")
    if not left or outcome is None:
        return options, ()
    return {**options, **{name: outcome[1][name] for name in left}}, outcome[2]


def _decide(optimizer: Any, model: nn.Module | None, options: dict[str, Any], comm: Comm, facts: list[tuple[Any, ...]]) -> Plan:
    """The plan of these options on this host, within what is free (auto) or there at all."""
    auto = is_auto(options["stage"])
    hosts: dict[str, list[tuple[int, int, int]]] = {}
    for (name, _), *values, _ in facts:
        hosts.setdefault(name, []).append((values[0], values[1], values[2]))
    # what a rank's model holds now is counted in the plan, so it is not taken
    room = min(min(r[0 if auto else 1] for r in ranks) + auto * sum(r[2] for r in ranks) for ranks in hosts.values())
    here = max(len(ranks) for ranks in hosts.values())
    names = names_of(model, optimizer.param_groups)
    params = [(names[p], p) for group in optimizer.param_groups for p in group["params"]]
    shared = isinstance(comm, GroupComm) and here > 1 and os.environ.get("ZEROLITE_SHARED", "1") != "0"
    kind, memory = device_memory(device_of(p for _, p in params))
    setting = Setting(
        here, shared and kind == "cpu", kind, options["update"] != "host", feed=feed_size(options["update"], threaded=True)
    )
    if options["resident"] in ("auto", 0.0) and by_memory(comm, [fact[0] for fact in facts], all(fact[-1] for fact in facts)):
        options = {**options, "gradients": "host" if is_auto(options["gradients"]) else options["gradients"]}
    held = sum(p.numel() * p.element_size() for _, p in params if p.is_cuda)
    free = memory[0] + held if memory is not None else None
    limits = Limits(host=room, device=memory[1] if memory is not None and not auto else free)
    question = Question(model, params, optimizer, options, comm.size, setting, free)
    return choose(question, options["stage"], options["offload"], options["moments"], limits)
