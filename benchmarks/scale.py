"""A model of step time and memory: calibrated on measured runs, checked by leaving a world out, applied to 8 to 1,024 ranks.

    zerolite bench scale [--results benchmarks/results] [--hardware H100|A100|FILE.json]

Calibration, on one CPU host of c cores with N ranks (T: seconds of a step, M: bytes of all ranks together):

    T(N) = compute(N) + overhead(N)
    compute(N)  = A N/c + B max(1, N/c)    every rank's work shares the cores; what one thread of a rank does alone does not
    overhead(N) = U u(N) + X (N - 1)       u = 1 where states are sharded (each element is updated once), N where not;
                                           N - 1 times the parameters' bytes travel, on all ranks together
    M(N) = R N + S                         what each rank has, and what they hold once between them

A and B come from "model alone", U and X from a system's overheads, R and S from its memory; none is negative. Each is fitted
with the other worlds alone, and predicts the world that was left out. Worlds that all fill the cores cannot tell B from A: from
those alone, a smaller world is predicted as if its threads scaled perfectly (B = 0).

Forecast, a rank of N, H of them on a host, P parameters of w = 2 bytes, T tokens a rank:

    compute  = 8 P T / (peak x mfu)              forward 2, backward 4, and 2 for recomputed activations (checkpointing)
    exchange = max(w P (H-1)/N / inside, w P (N-H)/N / network) + buckets x (N-1) x latency     an all-to-all of slices
    publish  = the same without states whole; stage 3 gathers twice; stage 0 does it with gradients
    update   = (26 + 2 N) or fewer bytes of P/N elements / device memory; with offload 1/H of the host's update, and the bus
    serial     = compute + exchange + publish + update; overlapped = update + max(compute, exchange + publish)

Bytes are zerolite.plan()'s, with activations 2 s b h a layer and 34 s b h for the one being recomputed (Korthikanti et al.
2022, "Reducing Activation Recomputation in Large Transformer Models", section 4). Hardware is stated, not measured: the
makers' data sheets, and assumptions that say so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Row, read, shown, store
from benchmarks.progress import show
from benchmarks.systems import ALONE

TOLERANCE = 0.10  # of a prediction of a world that was left out


@dataclass(frozen=True)
class Hardware:
    """What a forecast is for; bytes and seconds."""

    name: str
    peak: float  # floating-point operations a second of one rank, bf16 dense
    memory: float  # bytes of a rank's device
    bandwidth: float  # of it, bytes a second
    inside: float  # bytes a second of a rank to others of its host, one way
    network: float  # of a rank to other hosts, one way
    bus: float  # between a device and its host, one way
    here: int = 8  # ranks of a host
    host: float = 2e12  # bytes of a host
    mfu: float = 0.4  # assumed: part of `peak` that a model reaches
    latency: float = 2e-6  # assumed: seconds of one message
    update: float = 0.04e-9  # assumed: seconds an element of a host's update with all of its cores
    source: str = "a file"


#: NVIDIA's data sheets of H100 SXM5 and A100 SXM4 80 GB; networks of DGX H100 and DGX A100 (8 x 400 and 8 x 200 Gb/s).
HARDWARE = {
    "H100": Hardware(
        "H100 SXM 80 GB, 8 a host", 989e12, 80e9, 3.35e12, 450e9, 50e9, 50e9, source="data sheets; mfu etc. assumed"
    ),
    "A100": Hardware(
        "A100 SXM 80 GB, 8 a host", 312e12, 80e9, 2.04e12, 300e9, 25e9, 25e9, source="data sheets; mfu etc. assumed"
    ),
}


# ---- calibration


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


def compute_features(world: int, cores: int) -> list[float]:
    return [world / cores, max(1.0, world / cores)]


def overhead_features(world: int, sharded: bool) -> list[float]:
    return [1.0 if sharded else float(world), world - 1.0]


def sharded(system: str) -> bool:
    """Whether an element's states are on one rank only."""
    return not (system.startswith("DDP") or system.endswith(" 0") or system == ALONE)


def predict(at: dict[int, Row], alone: dict[int, Row], world: int, known: Sequence[int], cores: int) -> dict[str, float]:
    """Step time and memory at `world` from the rows at the `known` worlds."""

    def line(features: list[list[float]], values: list[float], here: list[float]) -> float:
        return sum(c * x for c, x in zip(fit(features, values), here, strict=True))

    system = at[known[0]]["system"]
    step = line([compute_features(n, cores) for n in known], [alone[n]["step"] for n in known], compute_features(world, cores))
    if system != ALONE:
        over = [overhead_features(n, sharded(system)) for n in known]
        step += line(over, [at[n]["overhead"] for n in known], overhead_features(world, sharded(system)))
    found = {"step": step}
    for name in ("peak", "rest"):
        found[name] = line([[n, 1.0] for n in known], [at[n][name] for n in known], [world, 1.0])
    return found


def calibrate(rows: list[Row]) -> list[Row]:
    """For each model and system that was measured at three worlds or more: each world predicted from the others."""
    groups: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        if row["benchmark"] == "step" and "rest" in row:
            groups.setdefault((row["model"], row["system"]), {})[row["ranks"]] = row
    found: list[Row] = []
    for (model, system), at in groups.items():
        alone = groups.get((model, ALONE), {})
        worlds = sorted(set(at) & set(alone))
        for world in worlds if len(worlds) >= 3 else []:
            known = [n for n in worlds if n != world]
            guess = predict(at, alone, world, known, at[world]["conditions"]["cores"])
            errors = {name: value / at[world][name] - 1 for name, value in guess.items()}
            row = {
                "benchmark": "scale",
                "kind": "calibration",
                "model": model,
                "system": system,
                "ranks": world,
                "known": known,
            }
            found.append({**row, "predicted": guess, "measured": {k: at[world][k] for k in guess}, "errors": errors})
    return found


# ---- forecast

_LLAMA = {"model_type": "llama", "tie_word_embeddings": False, "num_key_value_heads": 8, "vocab_size": 128256}
#: Names of zerolite.shapes.NAMES, or the values of a config: Llama-3.1-405B's as published, 180B in between.
SIZES: dict[str, dict[str, Any] | None] = {
    "llama-2-7b": None,
    "llama-2-13b": None,
    "llama-3-70b": None,
    "llama shape of 180B": {
        **_LLAMA, "hidden_size": 12288, "intermediate_size": 40960, "num_hidden_layers": 96, "num_attention_heads": 96,
    },
    "llama-3.1-405b": {
        **_LLAMA, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
    },
}  # fmt: skip
WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
LAYOUTS = ((1, None), (2, None), (3, None), (2, "states"), (3, "states"), (3, "all"))  # the first that fits is told
BUCKET = 25 * 2**20


def activations(config: Any, tokens: int) -> int:
    """Bytes with every block recomputed: the blocks' inputs, and one block in full."""
    return tokens * config.hidden_size * (2 * config.num_hidden_layers + 34)


def seconds(hw: Hardware, count: float, world: int, tokens: int, stage: int, offload: str | None) -> dict[str, float]:
    """The parts of a step, and the step without and with overlap."""
    here, w = min(hw.here, world), 2.0
    one = max(w * count * (here - 1) / world / hw.inside, w * count * (world - here) / world / hw.network)
    one += w * count / BUCKET * (world - 1) * hw.latency if world > 1 else 0.0
    elements = count / world if stage else count
    parts = {"compute": 8 * count * tokens / (hw.peak * hw.mfu), "exchange": one, "publish": one * (2 if stage == 3 else 1)}
    if offload:
        parts["update"] = here * elements * hw.update + 2 * w * elements / hw.bus
        parts["update"] += 2 * w * elements / hw.bus if offload == "all" else 0.0
    else:
        parts["update"] = elements * (24 + 2 * world) / hw.bandwidth
    moved = parts["exchange"] + parts["publish"]
    serial = parts["compute"] + moved + parts["update"]
    return {**parts, "serial": serial, "overlapped": max(parts["compute"], moved) + parts["update"]}


def forecast(hw: Hardware, tokens: int, sizes: Sequence[str] = tuple(SIZES), worlds: Sequence[int] = WORLDS) -> list[Row]:
    """For each size and world the first layout that fits, its bytes and its seconds."""
    import torch

    from zerolite.planner import question_of
    from zerolite.shapes import from_config, model_of

    rows: list[Row] = []
    for name in sizes:
        values = SIZES[name]
        model: Any = from_config(config_of(values)) if values else model_of(name)[0]
        count = sum(p.numel() for p in model.parameters())
        for world in worlds:
            here = min(hw.here, world)
            question, _ = question_of(model, world=world, ranks_per_host=here, device="cuda", param_dtype=torch.bfloat16)
            row: Row = {"benchmark": "scale", "kind": "forecast", "model": name, "numel": count, "ranks": world}
            row |= {"hardware": hw.name, "tokens": tokens, "fits": False, "stated": dataclasses.asdict(hw)}
            for stage, offload in LAYOUTS:
                plan = question.plan(stage, offload, "fp32")
                device = plan.used("device") + activations(model.config, tokens)
                if device <= hw.memory and plan.host_peak <= hw.host:
                    row |= {"fits": True, "stage": stage, "offload": offload, "device": device, "host": plan.host_peak}
                    row |= seconds(hw, count, world, tokens, stage, offload)
                    break
            rows.append(row)
    return rows


def config_of(values: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    values = dict(values)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="zerolite bench scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="where the measured runs are")
    parser.add_argument("--hardware", default="H100", help=f"{', '.join(HARDWARE)}, or a JSON file with the same names")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a rank and step (4096)")
    args = parser.parse_args()
    if args.hardware in HARDWARE:
        hardware = HARDWARE[args.hardware]
    else:
        hardware = Hardware(**json.loads(Path(args.hardware).read_text()))
    rows = calibrate(read(args.results)) + forecast(hardware, args.tokens)
    for row in rows:
        if row["kind"] == "calibration":
            off = ", ".join(f"{name} {error:+.0%}" for name, error in row["errors"].items())
            print(f"{row['model']} {row['system']}: {row['ranks']} ranks from {row['known']}: {off}")
    if not any(row["kind"] == "calibration" for row in rows):
        print("no calibration: no model was measured at three worlds (zerolite bench --models gpt2-49M --worlds 1,2,4)")
    print(f"\n{hardware.name}, {args.tokens} tokens a rank; a step, without and with overlap")
    for row in rows:
        if row["kind"] == "forecast":
            print(f"{row['model']:20} x{row['ranks']:<5}", told(row))
    print(f"\nstored in {shown(store('scale', rows))}")


def told(row: Row) -> str:
    if not row["fits"]:
        return "does not fit"
    way = f"stage {row['stage']}" + (f" + offload {row['offload']}" if row["offload"] else "")
    return f"{way:24}{row['device'] / 1e9:7.1f} GB   {show_step(row['serial'])} / {show_step(row['overlapped'])}"


def show_step(value: float) -> str:
    return f"{value:.2f} s" if value < 100 else show(value)


if __name__ == "__main__":
    main()
