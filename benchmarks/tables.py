"""The tables of docs/benchmarks.md, as text: every figure comes from the stored results."""

from __future__ import annotations

import re

from benchmarks import reasons
from benchmarks.calibrate import TOLERANCE
from benchmarks.harness import Row
from benchmarks.peers import PEERS
from benchmarks.targets import OTHERS, best, disturbed, missed, of_largest, of_steps
from benchmarks.update import BYTES

NOTES = {
    "update": """
Targets: 2.2 times faster than DeepSpeed's whole path, 1.05 times faster than its fp32 Adam alone, 90 % of the loop
that only reads, modifies and writes the same streams. That loop is plain: it asks for no memory ahead of its loads, as
the update does, so the update can be the faster one.
""",
    "step": """
Overhead is the step minus "model alone", round by round. Communication is the time within the parts before it during
which a collective, or a wait in shared memory, is under way in rank 0. First step: from the model in memory to the end of
the first step, construction included (in results of before: the step alone). Memory is physical, of all ranks, imports
and activations included; bytes a parameter are what one rank holds between steps, above what it held before the model
was there. MB on the wire: what the loopback interface carried, a rank and step.
Targets at stages 1 to 3: overhead at most 1/2 of DDP's and 1/6 of the best of DeepSpeed's at the stage, first step and peak
above imports at most 1/2 of it. Columns "of" compare with DDP, and with the best of all of DeepSpeed's. "Step in backward"
updates within the backward's column, and clips nothing; all others clip.
""",
    "largest": """
Targets at two ranks: 2 times DeepSpeed's largest with exact moments, 3 times with int8. How it is found, and what a limit is:
`zerolite bench largest --help`. At two ranks parameters (one copy for both), remainder, moments and gradients rest at
1 + 1 + 4 + 1 = 7 bytes a parameter and rank, with int8 moments at 4.02; the rest of the column is imports, activations and
gradients on their way, which a smaller state does not make smaller. The targets ask for 1/2 and 1/3 of DeepSpeed's column.
"Step in backward" has no gradients at rest, 6 and 3.02 bytes, and clips nothing; all others clip.
""",
    "passes": """
Ceilings are plain loops over the same bytes. In caches a loop can be faster than one of them: the sizes here are above.
""",
    "exchange": """
Target: five times faster than gloo's `reduce_scatter` alone, which leaves Adam and the all-gather still to do.
""",
    "moments": """
Targets: bf16 within 0.2 % of fp32's loss, int8 within 0.5 %, each seed by itself. `docs/moments.md` has the curves.
""",
    "device": """
Targets: updates at 88 % of the device's copy bandwidth, 2 bytes a parameter each way at 85 % of the bus, update exposed in
at most 15 % of a step.
""",
    "no device": """## A GPU and its bus

Not yet measured: `benchmarks/gpu.sh` does it on a machine with one. Targets: the fused update at 88 % of the device's copy
bandwidth; an offloaded step that moves 2 bytes a parameter each way at 85 % of the bus, is 2 times faster than DeepSpeed's
ZeRO-2 and ZeRO-3 offload for Llama shapes of 1.5 B and 7 B parameters, and loses at most 15 % of its time to the update.
""",
    "footprint": """
Target: within 3 % of the plan.
""",
}


def repeatable(command: str) -> str:
    """A stored command as it is written today: without the folder that its page went to, and as a module."""
    return re.sub(r" --docs \S+", "", command).replace("python benchmarks/moments.py", "python -m benchmarks.moments")


def conditions(row: Row) -> str:
    given = row["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in given["versions"].items() if version)
    return f"{given['cpu']}, {given['cores']} cores, {versions}, commit {given['commit']}: `{repeatable(given['command'])}`\n"


def left_out(rows: list[Row]) -> str:
    """A line for the systems that did not run; they are never left out silently."""
    told = [f"{row['system']} ({row['why']})" for row in rows if row["benchmark"] in ("skipped", "failed")]
    return f"\nLeft out: {'; '.join(told)}.\n" if told else ""


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def update(rows: list[Row]) -> str:
    body = []
    for r in rows:
        moved = BYTES.get(r["side"], r["bytes"])  # counted, not measured: older rows have 42 for what is 48
        speed, against = moved / r["ns"][1], r["ratio_to_zerolite"]
        body.append([r["side"], *(f"{v:.3f}" for v in r["ns"]), str(moved), f"{speed:.1f}", f"{against:.2f}"])
    head = ["ns a parameter", "p20", "p50", "p80", "bytes", "GB/s", "time against zerolite"]
    first = f"## The host update\n\n{rows[0]['elements']:,} elements, {rows[0]['threads']} threads. {conditions(rows[0])}\n"
    return first + table(head, body) + NOTES["update"]


def passes(rows: list[Row]) -> str:
    body = []
    for r in rows:
        against = "" if r["ratio_to_zerolite"] is None else f"{r['ratio_to_zerolite']:.2f}"
        body.append([r["side"], *(f"{v:.3f}" for v in r["ns"]), str(r["bytes"]), f"{r['bytes'] / r['ns'][1]:.1f}", against])
    head = ["ns an element", "p20", "p50", "p80", "bytes", "GB/s", "time against zerolite"]
    first = f"## Packing, averaging, the norm\n\n{rows[0]['elements']:,} elements of bf16, {rows[0]['threads']} threads, "
    first += f"{rows[0]['peak_flops'] / 1e9:.0f} GFLOP/s in registers. {conditions(rows[0])}\n"
    return first + table(head, body) + NOTES["passes"]


def milliseconds(row: Row, name: str) -> str:
    value = row.get(name)
    return "" if value is None else f"{value * 1e3:.0f}"


STEP = [
    "ms",
    "forward",
    "backward",
    "update",
    "communication",
    "step",
    "p20",
    "p80",
    "overhead",
    "of DDP's",
    "of DeepSpeed's best",
]
STEP += ["first step", "tokens/s", "peak MB, all ranks", "of it imports", "bytes a parameter", "MB on the wire", "final loss"]


def step(blocks: list[list[Row]], passes: list[Row], update: list[Row]) -> str:
    """One table for each model and world."""
    parts = []
    for rows in blocks:
        measured = [row for row in rows if row["benchmark"] == "step"]
        if not measured:
            if told := left_out(rows):
                parts.append(f"### {rows[0].get('model', '')}, {rows[0]['ranks']} ranks\n{told}")
            continue
        peers = [best(measured, "overhead", peer) for peer in ("DDP", "DeepSpeed")]
        odd = disturbed(measured)
        body = [step_row(row, [peer["overhead"] if peer and not odd else None for peer in peers]) for row in measured]
        filled = [k for k in range(len(STEP)) if any(line[k] for line in body)]  # older results have fewer columns
        body = [[line[k] for k in filled] for line in body]
        size, ranks, model = measured[0]["numel"] / 1e6, measured[0]["ranks"], measured[0].get("model", "GPT-2")
        title = f"### {model}, {size:.1f} M parameters, bf16, {ranks} rank{'s' if ranks > 1 else ''}\n\n"
        text = f"{title}{conditions(measured[0])}\n{table([STEP[k] for k in filled], body)}"
        if odd:
            text += f"\nDisturbed: {odd}. Overheads say nothing and are not judged.\n"
        beside = [f"{r['system']} ({r['others']:.1f})" for r in measured if r.get("others", 0.0) > OTHERS]
        if beside:
            text += f"\nOther processes took more than {OTHERS} cores while these were timed: {', '.join(beside)}.\n"
        parts.append(text + left_out(rows) + missed(of_steps(rows)) + reasons.of_block(rows, passes, update))
    return "## A training step\n\n" + "\n".join(parts) + NOTES["step"] if parts else ""


def step_row(r: Row, peers: list[float | None]) -> list[str]:
    shares = [f"{r['overhead'] / peer:.2f}" if peer and r["system"].startswith("zerolite") else "" for peer in peers]
    p20, p80 = (f"{r['steps'][k] * 1e3:.0f}" if "steps" in r else "" for k in (0, 2))
    wire = "" if r.get("wire") is None or r["wire"] < 0 else f"{r['wire'] / 1e6:.1f}"
    per = f"{r['bytes_a_parameter']:.2f}" if "bytes_a_parameter" in r else ""
    rate = f"{r['tokens_a_second']:,.0f}" if "tokens_a_second" in r else ""
    memory = r["peak"] + (r.get("device_peak") or 0)
    ends = [
        milliseconds(r, "first"),
        rate,
        f"{memory / 1e6:.0f}",
        f"{r['base'] / 1e6:.0f}" if "base" in r else "",
        per,
        wire,
        f"{r['loss']:.4f}",
    ]
    times = [milliseconds(r, name) for name in ("forward", "backward", "update", "communication", "step")]
    return [r["system"], *times, p20, p80, milliseconds(r, "overhead"), *shares, *ends]


def not_asked(rows: list[Row]) -> str:
    """DeepSpeed's systems that were not among those that were asked for."""
    known = {row["system"] for row in rows}
    left = [name for name in PEERS if name.startswith("DeepSpeed") and name not in known]
    return f"\nNot among those that were tried: {', '.join(left)}.\n" if left else ""


def largest(rows: list[Row]) -> str:
    found = [row for row in rows if row["benchmark"] == "largest"]
    if not found:
        return ""
    body = []
    for r in found:
        used = f"{r['best']['peak'] / 1e6:.0f}" if r["best"] else ""
        each = f"{r['best']['peak'] / r['numel'] / r['ranks']:.2f}" if r["best"] else ""
        body.append([r["system"], str(r["layers"]), f"{r['numel'] / 1e6:.0f}", used, each, str(len(r["trials"]))])
    head = ["largest that trains", "layers", "M parameters", "MB, all ranks", "bytes a parameter and rank", "trials"]
    one = found[0]
    checkpoint = one.get("checkpoint", False)
    text = "## The largest model" + ", with activation checkpointing" * checkpoint
    text += f"\n\n{one['limit'] / 1e9:.3g} GB for {one['ranks']} ranks together, width {one['width']}. "
    return (
        text
        + f"{conditions(one)}\n{table(head, body)}"
        + left_out(rows)
        + not_asked(rows)
        + missed(of_largest(rows))
        + NOTES["largest"]
    )


def exchange(rows: list[Row]) -> str:
    body = []
    for r in rows:
        body.append([r["side"], *(f"{v:.1f}" for v in r["ms"]), f"{r['bytes'] / 1e6:.0f}", f"{r['ratio_to_zerolite']:.2f}"])
    head = ["ms", "p20", "p50", "p80", "MB (memory; gloo: wire)", "time against zerolite"]
    first = f"## The exchange at {rows[0]['ranks']} ranks\n\n{rows[0]['elements']:,} elements. {conditions(rows[0])}\n"
    return first + table(head, body) + NOTES["exchange"]


def small(rows: list[Row]) -> str:
    body = [[r["side"], *(f"{v:.1f}" for v in r["ms"]), f"{r['ratio']:.1f}"] for r in rows]
    head = ["ms", *(f"{count:,} parameters" for count in rows[0]["counts"]), "ratio"]
    title = "## Many small parameters" + ", clipped" * rows[0].get("clip", False)
    first = f"{title}\n\n{rows[0]['elements']:,.0f} elements, {rows[0]['ranks']} ranks. {conditions(rows[0])}\n"
    each = {r["side"]: (r["ms"][1] - r["ms"][0]) * 1e3 / (r["counts"][1] - r["counts"][0]) for r in rows}
    more = [each[r["side"]] for r in rows if r["side"].startswith("stage") and r["ratio"] >= 2]
    note = "The target, less than twice the time of the few, is met."
    if more:
        cost = f"{min(more):.1f} to {max(more):.1f} microseconds a step"
        note = f"The target, less than twice the time of the few, is missed: each parameter costs {cost}."
        hook = each.get("an empty hook each, overhead")  # older results have none
        if hook is not None:
            note += f"\nOf these, autograd's call of a Python hook that does nothing takes {hook:.1f}."
    return f"{first}{table(head, body)}\n{note}\n"


def footprint(rows: list[Row]) -> str:
    body = []
    for r in rows:
        body.append([r["side"], f"{r['planned'] / 1e6:.1f}", f"{(r['process'] - r['base']) / 1e6:.1f}", f"{r['ratio']:.3f}"])
    head = ["MB, all ranks", "planned at rest", "processes (PSS) less base", "ratio"]
    size, ranks = rows[0]["numel"] / 1e6, rows[0]["ranks"]
    first = f"## Process memory against the plan\n\n{size:.1f} M parameters, bf16, {ranks} ranks. {conditions(rows[0])}\n"
    return first + table(head, body) + NOTES["footprint"]


def scale(rows: list[Row]) -> str:
    """Calibration with its errors, and the forecast for stated hardware."""
    text = "## Scale\n\n"
    checked = [row for row in rows if row["kind"] == "calibration"]
    if checked:
        body = [[r["model"], r["cpu"], r["system"]] for r in checked]
        for line, r in zip(body, checked, strict=True):
            line += [f"{r['ranks']} from {', '.join(map(str, r['known']))}"]
            line += [f"{r['measured']['step'] * 1e3:.0f}", f"{r['predicted']['step'] * 1e3:.0f}"]
            line += [f"{r['errors'][name]:+.1%}" for name in ("step", "peak", "rest")]
        head = ["model", "processor", "system", "ranks", "measured, ms", "predicted, ms", "step", "peak", "rest"]
        near = {name: sum(abs(r["errors"][name]) <= TOLERANCE for r in checked) for name in checked[0]["errors"]}
        text += (
            f"Each world predicted from the others (`benchmarks/calibrate.py`). {conditions(checked[0])}\n{table(head, body)}\n"
        )
        each = ", ".join(f"{count} of {len(checked)} of {name}" for name, count in near.items())
        text += f"{sum(near.values())} of {3 * len(checked)} predictions lie within {100 * TOLERANCE:.0f} %: {each}.\n\n"
    ahead = [row for row in rows if row["kind"] == "forecast"]
    if ahead:
        one, body = ahead[0], []
        for r in ahead:
            way = "does not fit" if not r["fits"] else f"{r['stage']}" + (f" + offload {r['offload']}" if r["offload"] else "")
            cells = [""] * 8
            if r["fits"]:
                cells = [f"{r['device'] / 1e9:.1f}", f"{r['host'] / 1e9:.0f}"]
                cells += [f"{r[name]:.2f}" for name in ("compute", "exchange", "publish", "update", "serial", "overlapped")]
            body.append([r["model"], f"{r['numel'] / 1e9:.1f}", str(r["ranks"]), way, *cells])
        head = [
            "model",
            "B parameters",
            "ranks",
            "stage",
            "GB a rank",
            "GB a host",
            "compute, s",
            "exchange",
            "publish",
            "update",
        ]
        stated = ", ".join(f"{name} {value:g}" for name, value in one["stated"].items() if isinstance(value, (int, float)))
        text += f"Not measured: a forecast for {one['hardware']}, {one['tokens']} tokens a rank. {stated} "
        text += f"({one['stated']['source']}). Formulas: `zerolite bench scale --help`.\n\n"
        text += table([*head, "step, no overlap", "step, full overlap"], body)
    return text


def construct(rows: list[Row]) -> str:
    body = []
    for r in rows:
        each = [f"{r['built']:,} of {r['ranks']:,}", *(f"{v * 1e3:.0f}" for v in r["seconds"])]
        owned = "yes" if r["covered"] else "not checked"
        body.append([str(r["stage"]), *each, f"{r['held'][1] / 1e6:.1f}", f"{r['planned'] / 1e6:.1f}", owned])
    head = ["stage", "ranks built", "ms a rank, p20", "p50", "p80", "MB held", "MB planned at rest", "each element owned once"]
    first = (
        f"## Construction of {rows[0]['ranks']:,} ranks\n\n{rows[0]['model']}, {rows[0]['numel'] / 1e6:.1f} M parameters, rank "
    )
    return first + f"after rank in one process, without the group's collectives. {conditions(rows[0])}\n{table(head, body)}"


def moments(rows: list[Row]) -> str:
    ends = {(r["seed"], r["moments"]): r["end"] for r in rows}
    kinds = list(dict.fromkeys(r["moments"] for r in rows))
    body = []
    for seed in sorted({seed for seed, _ in ends}):
        away = [f"{ends[seed, kind]:.4f} ({100 * (ends[seed, kind] / ends[seed, 'fp32'] - 1):+.2f} %)" for kind in kinds[1:]]
        body.append([str(seed), f"{ends[seed, 'fp32']:.4f}", *away])
    size, steps = rows[0]["parameters"] / 1e6, rows[0]["steps"]
    first = f"## Loss with rounded moments\n\nGPT-2 shape, {size:.1f} M parameters, {steps} steps, mean of the last 20. "
    return first + f"{conditions(rows[0])}\n" + table(["seed", *kinds], body) + NOTES["moments"]


def device(rows: list[Row]) -> str:
    if not rows:
        return NOTES["no device"]
    body = []
    for r in (row for row in rows if row["benchmark"] == "device"):
        low, mid, high = (f"{value * 1e3:.2f}" for value in r["seconds"])
        each = r.get("a parameter", {})
        crossed = f"{each['down']:.2f} + {each['up']:.2f}" if each else ""
        part = f"{r['of a copy']:.2f}" if "of a copy" in r else f"{r['exposed']:.2f} exposed" if "exposed" in r else ""
        body.append([r["part"], r["name"], low, mid, high, f"{r['GB/s']:.1f}", part, crossed])
    head = ["part", "what", "ms p20", "p50", "p80", "GB/s", "of a copy, or update exposed", "bytes a parameter, down + up"]
    return f"## A GPU and its bus\n\n{conditions(rows[0])}\n" + table(head, body) + left_out(rows) + NOTES["device"]
