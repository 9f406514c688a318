"""A model of step time and memory: calibrated on measured runs, checked by leaving a world out, applied to 8 to 1,024 ranks.

    zerolite bench scale [--results benchmarks/results] [--hardware H100|A100|FILE.json]

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

from benchmarks import calibrate, harness
from benchmarks.harness import Row, read, shown, store
from benchmarks.progress import show


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
        prog="zerolite bench scale",
        description=f"{__doc__}\nCalibration: {calibrate.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="where the measured runs are")
    parser.add_argument("--hardware", default="H100", help=f"{', '.join(HARDWARE)}, or a JSON file with the same names")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a rank and step (4096)")
    args = parser.parse_args()
    if args.hardware in HARDWARE:
        hardware = HARDWARE[args.hardware]
    else:
        hardware = Hardware(**json.loads(Path(args.hardware).read_text()))
    rows = calibrate.calibrate(read(args.results)) + forecast(hardware, args.tokens)
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
