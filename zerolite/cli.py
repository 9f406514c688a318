"""The command line: `zerolite plan` and `zerolite bench`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zerolite.cost import show_ms
from zerolite.options import GRADIENTS
from zerolite.placement import Plan, choices
from zerolite.planner import DEFAULT_BUCKET_MB, Candidate, Limits, Question, explain, question_of
from zerolite.rates import rates
from zerolite.shapes import NAMES, model_of, parse_bytes, parse_count
from zerolite.version import __version__

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 0 where something fits, 1 where nothing does, 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(prog="zerolite", description="ZeRO for any PyTorch program by one line.")
    parser.add_argument("--version", action="version", version=f"zerolite {__version__}")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["bench"]:  # has its own options, in the source tree
        return _bench(given[1:])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "bench", help="measure beside DDP, FSDP2, DeepSpeed and others (`zerolite bench --help`)", add_help=False
    )
    options = commands.add_parser(
        "plan",
        help="which stages, offloads and moments fit, and which is the fastest",
        description="Plans memory without allocating it: a table of stages, offloads and moments, what fits, what is fastest.",
        epilog=f"Known names: {', '.join(NAMES)}. Sizes: 80G is 80e9 bytes, 80GiB is 80 * 2^30.",
    )
    options.add_argument("model", nargs="?", help="a known name, or the path of a transformers config.json or of its folder")
    options.add_argument("--config", metavar="PATH", help="the path of a transformers config.json")
    options.add_argument("--params", metavar="N", help="a number of parameters instead: 7e9, 7B")
    options.add_argument("--world", type=int, default=1, metavar="N", help="ranks (1)")
    options.add_argument("--ranks-per-host", type=int, metavar="N", help="ranks of one host (all)")
    options.add_argument("--device", choices=("cpu", "cuda"), help="cuda where --device-mem is given, else cpu")
    options.add_argument("--device-mem", metavar="SIZE", help="memory of each rank's device")
    options.add_argument("--host-mem", metavar="SIZE", help="memory of one host")
    options.add_argument(
        "--gradients", choices=GRADIENTS, default="auto", help="where they rest with offload (on the device where it has room)"
    )
    options.add_argument("--dtype", choices=DTYPES, default="bf16", help="compute dtype of the parameters (bf16)")
    options.add_argument("--bucket-mb", type=float, default=DEFAULT_BUCKET_MB, metavar="MIB", help="size of a bucket (25)")
    options.add_argument("--micro-batches", type=int, default=1, metavar="K", help="backward passes before a step (1)")
    options.add_argument(
        "--step-in-backward",
        action="store_true",
        help="stage 3 whose gradients do not rest: updated in the backward, unclipped",
    )
    options.add_argument("--batch", metavar="BxT", help="token ids of this shape, e.g. 4x1024: adds activations")
    options.add_argument("--json", action="store_true", help="the same as JSON")
    args = parser.parse_args(given)
    try:
        code = _plan(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has read enough; what is left would raise again as Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"zerolite plan: {error}", file=sys.stderr)
        return 2


def _bench(arguments: list[str]) -> int:
    """Runs the source tree's benchmarks: results belong to a commit, and an installed package has none."""
    tree = _source_tree([Path(__file__).parent.parent, Path.cwd(), *Path.cwd().parents])
    if tree is None:
        print(
            "zerolite bench: expected a source tree with benchmarks/, found none beside the package or above this folder. An "
            "installed package has none: unpack or clone the sources, then there `make peers bench` (or `zerolite bench`).",
            file=sys.stderr,
        )
        return 2
    paths = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.call([sys.executable, "-m", "benchmarks", *arguments], env={**os.environ, "PYTHONPATH": paths})


def _source_tree(candidates: Sequence[Path]) -> Path | None:
    """The first folder that holds zerolite's benchmarks."""
    marks = ("benchmarks/suite.py", "csrc/bindings.cpp")
    return next((path for path in candidates if all((path / mark).is_file() for mark in marks)), None)


def _plan(args: argparse.Namespace) -> int:
    given = [value for value in (args.model, args.config, args.params) if value is not None]
    if len(given) != 1:
        raise ValueError(f"expected one of a name or path, --config or --params, got {len(given)}. Try: zerolite plan gpt2-xl")
    limits = Limits(parse_bytes(args.device_mem, "--device-mem"), parse_bytes(args.host_mem, "--host-mem"))
    for option, given_size, size in (
        ("--device-mem", args.device_mem, limits.device),
        ("--host-mem", args.host_mem, limits.host),
    ):
        if size is not None and size < 1 << 20:
            raise ValueError(f"{option}: expected a size such as 80G or 512GiB, got {given_size}, which is {size} bytes")
    device = args.device or ("cpu" if limits.device is None else "cuda")
    if device == "cpu" and limits.device is not None:
        raise ValueError("--device-mem: expected --device cuda, got cpu, where all memory is --host-mem")
    if args.batch is not None and args.params is not None:
        raise ValueError("--batch: expected a name or --config, whose model can run, got --params")
    source = args.model if args.config is None else Path(args.config)
    if isinstance(source, Path) and not source.exists():
        raise ValueError(f"--config: expected the path of a config.json or of its folder, found nothing at {args.config!r}")
    model, what = model_of(parse_count(args.params) if args.params is not None else source)
    question, _ = question_of(
        model.float(),  # a config may name another dtype than --dtype
        world=args.world,
        ranks_per_host=args.ranks_per_host,
        device=device,
        param_dtype=DTYPES[args.dtype],
        bucket_mb=args.bucket_mb,
        micro_batches=args.micro_batches,
        step_in_backward=args.step_in_backward,
        gradients=args.gradients,
        device_bytes=limits.device,
        batch=None if args.batch is None else _tokens(args.batch, model),
    )
    found = rates()
    ways = choices(True, device, whole=False, in_backward=args.step_in_backward)
    ranked = question.candidates(ways, question.kinds, limits, found)
    fits = [candidate for candidate in ranked if not candidate.missing]
    exact = [candidate for candidate in fits if candidate.moments == "fp32"]
    best = next(iter(exact or fits), None)  # rounded moments only where exact ones do not fit
    shown = sorted(ranked, key=lambda c: (list(question.kinds).index(c.moments), ways.index((c.plan.stage, c.plan.offload))))
    if args.json:
        print(json.dumps(_json(question, what, limits, shown, best), indent=1))
    else:
        print(_text(question, what, limits, shown, best, counted=args.params is not None))
    return 0 if best is not None else 1


def _tokens(text: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    try:
        rows, length = (int(part) for part in text.lower().split("x"))
        ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
    except (ValueError, RuntimeError):
        raise ValueError(f"--batch: expected rows x length such as 4x1024, got {text!r}") from None
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    learned = [m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding)]  # rotary ones have no end
    if isinstance(most, int) and length > most and any(most <= size <= most + 2 for size in learned):
        raise ValueError(f"--batch: expected a length of at most {most}, the config's max_position_embeddings, got {text!r}")
    return {"input_ids": ids, "labels": ids}


def size_text(value: int) -> str:
    """Bytes in units of 1000, three digits."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}" if value < 99.95 else f"{value:.0f} {unit}"
        value /= 1000  # type: ignore[assignment]
    raise AssertionError


def _text(question: Question, what: str, limits: Limits, shown: list[Candidate], best: Candidate | None, counted: bool) -> str:
    setting, world = question.setting, question.world
    on_cpu = setting.device == "cpu"
    limit = [f"{name} {size_text(v)}" for name, v in (("device", limits.device), ("host", limits.host)) if v is not None]
    lines = [
        f"{what}: {sum(p.numel() for _, p in question.params):,} parameters in {question.options['param_dtype']}".replace(
            "torch.", ""
        ),
        f"{world} {'CPU' if on_cpu else 'GPU'} rank(s), {setting.here} a host; memory: {', '.join(limit) or 'no limit given'}",
        "",
    ]
    columns = ["stage", "offload", *([] if on_cpu else ["gradients"]), "moments"]
    columns += [*([] if on_cpu else ["device a rank"]), "host a rank", "a host", "step"]
    table = [[*columns, "fits"]]
    for candidate in shown:
        plan = candidate.plan
        row = [str(plan.stage), plan.offload or "-", *([] if on_cpu else [plan.grads.home]), candidate.moments]
        row += [] if on_cpu else [size_text(plan.used("device"))]
        row += [size_text(plan.used("host")), size_text(plan.host_peak), show_ms(candidate.seconds)]
        short = ", ".join(f"{home} lacks {size_text(value)}" for home, value in candidate.missing.items())
        table.append([*row, f"no: {short}" if short else "yes  <- recommended" if candidate is best else "yes"])
    widths = [max(len(row[k]) for row in table) for k in range(len(columns))]
    for row in table:
        lines.append("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False)) + f"  {row[-1]}")
    lines += ["", "Bytes are the peak of a step. 'step' models update and communication alone, to rank plans by."]
    if not on_cpu:
        lines.append("GPU rows are a forecast: nothing was measured on a GPU yet, and its rates are assumed (ZEROLITE_RATES).")
    if setting.activations is None:
        runs = "" if counted else " (--batch 4x1024 adds them)"
        lines.append(f"Activations are not counted{runs}.")
    if best is None:
        apart = "more ranks make the device's part of stage 3 smaller, and " if not on_cpu else ""
        cure = f"Nothing fits: {apart}more hosts (--world, --ranks-per-host) what each of them holds"
        return "\n".join([*lines, "", f"{cure}; smaller batches, the activations."])
    return "\n".join([*lines, "", *_details(best), "", _line_to_add(best, question.options)])


def _details(best: Candidate) -> list[str]:
    """The terms of the recommended plan."""
    lines = [f"{best.label}, in bytes:", f"{'':24}{'memory':>8}{'held':>10}{'a rank':>20}{'a host':>22}"]
    for term in best.plan.terms:
        if term.rank:
            lines.append(f"{term.name:24}{term.home:>8}{term.when:>10}{term.rank:>20,}{term.host:>22,}")
    return lines


def _line_to_add(best: Candidate, options: dict[str, Any]) -> str:
    dtype, bucket_mb = options["param_dtype"], options["bucket_mb"]
    label = best.label.replace("stage ", "stage=", 1)  # the options as they are written
    size = "" if bucket_mb == DEFAULT_BUCKET_MB else f", bucket_mb={bucket_mb:g}"
    rest = ", gradients='host'" if best.plan.offload == "states" and options["gradients"] == "host" else ""
    return f"optimizer = zerolite.ZeroOptimizer(optimizer, model, {label}{rest}, param_dtype={dtype}{size})"


def _json(question: Question, what: str, limits: Limits, shown: list[Candidate], best: Candidate | None) -> dict[str, Any]:
    return {
        "model": what,
        "parameters": sum(p.numel() for _, p in question.params),
        "world": question.world,
        "ranks_per_host": question.setting.here,
        "device": question.setting.device,
        "device_bytes": limits.device,
        "host_bytes": limits.host,
        "plans": [_plan_json(candidate, candidate is best) for candidate in shown],
        "notes": explain(best, sorted(shown, key=lambda c: c.seconds), limits) if best is not None else [],
    }


def _plan_json(candidate: Candidate, recommended: bool) -> dict[str, Any]:
    plan: Plan = candidate.plan
    return {
        "stage": plan.stage,
        "offload": plan.offload,
        "gradients": plan.grads.home,
        "moments": candidate.moments,
        "fits": not candidate.missing,
        "missing": candidate.missing,
        "recommended": recommended,
        "bytes_at_rest": plan.bytes_at_rest,
        "bytes_peak": plan.bytes_peak,
        "host_peak": plan.host_peak,
        "seconds": candidate.seconds,
        "terms": [term._asdict() for term in plan.terms if term.rank],
    }
