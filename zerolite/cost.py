"""How long a step's update and communication take, modelled from rates; docs/plan.md has the formulas.

Nothing overlaps here and the model's own compute is left out: the figures rank plans, they do not predict a run.
"""

from __future__ import annotations

from zerolite.placement import Plan
from zerolite.rates import Rates


def seconds(plan: Plan, moments: str, found: Rates) -> float:
    """Seconds of one step's update and communication on a host, without overlap and without the model's own compute."""
    here, size = plan.setting.here, plan.size
    trained = plan.trained
    full = sum(row.full for row in trained)
    whole = sum(row.full for row in plan.rows)
    elements = sum(row.layout.shard if plan.states.sharded else row.layout.numel for row in trained)
    if plan.setting.device != "cpu":
        return _device_seconds(plan, moments, found, full, whole, elements)
    near = plan.setting.shared
    away = (size - here) if near else (size - 1)  # ranks that are reached by messages
    time = here * elements * getattr(found, moments) * 1e-9  # the host's cores share the ranks' updates
    wire = full * away / size
    if plan.grads.sharded and not plan.alone:
        time += here * full * (1 + 1 / size) / (found.average * 1e9)  # the average is a pass of its own
    if not plan.states.sharded:
        wire += full * (size - 1) / size  # averaged gradients, over the process group
    elif plan.params.sharded:
        copies = 0 if near and here == size else 2  # forward and backward
        wire += copies * whole * (size - 1) / size
        time += here * copies * whole / (found.average * 1e9) if plan.alone else 0.0
    else:
        wire += full * away / size
    return time + here * wire / (found.link * 1e9)


def _device_seconds(plan: Plan, moments: str, found: Rates, full: int, whole: int, elements: int) -> float:
    share = (plan.size - 1) / plan.size
    states = plan.at_rest("states")
    param = full // (plan.size if plan.states.sharded else 1)
    bus = 0.0
    if plan.states.home == "host":
        time = plan.setting.here * elements * getattr(found, moments) * 1e-9
        bus += 2 * param  # averaged gradients down, parameters up
    else:
        time = (2 * states + 3 * param) / (found.device_memory * 1e9)
    wire = full * share
    if not plan.states.sharded:
        wire += full * share
    elif plan.params.sharded:
        wire += 2 * whole * share
        if plan.params.home == "host":
            bus += 2 * whole / plan.size - param  # shards for both gathers; the update writes them on the host
    else:
        wire += full * share
    return time + bus / (found.bus * 1e9) + wire / (found.device_link * 1e9)


def show_ms(value: float) -> str:
    """Seconds as text."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"
