"""Rows of benchmarks, as tests need them."""

from __future__ import annotations

CONDITIONS = {"cpu": "a <b>", "cores": 2, "versions": {"torch": "2"}, "commit": "abc", "command": "python -m benchmarks"}


def row(system, overhead=0.1, **values):
    times = {"forward": 0.1, "backward": 0.2, "update": overhead, "communication": 0.05, "step": 0.3 + overhead}
    memory = {"peak": 2 << 30, "base": 1 << 30, "rest": 1 << 30, "bytes_a_parameter": 9.0, "plan": None}
    found = {"benchmark": "step", "system": system, "model": "gpt2-5M", "ranks": 2, "numel": 5_000_000, "overhead": overhead}
    found |= {
        "first": 1.0,
        "loss": 8.5,
        "wire": 1e6,
        "steps": [0.3, 0.4, 0.5],
        "tokens_a_second": 1000.0,
        "conditions": CONDITIONS,
    }
    made = {**found, **times, **memory, **values}
    return {**made, "peak_a_parameter": ((made["peak"] or 0) - made["base"]) / made["ranks"] / made["numel"]}
