"""Many small parameters against few large ones of the same bytes: what a step costs beyond autograd.

    python -m benchmarks.small [--ranks 2] [--elements 5e6] [--rounds 3]

The overhead of a step is the step minus forward and backward of the same model without an optimizer, in as many
processes; so autograd's own work on 10,000 leaves is not counted. "an empty hook each" is what autograd takes to call a
Python function that does nothing after each gradient: the least that any wrapper pays which hears of gradients that way.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from benchmarks.harness import on_ranks, quantile, shown, store

COUNTS = (10, 10_000)
SIDES = {-1: "model alone", 0: "an empty hook each"} | {stage: f"stage {stage}" for stage in (1, 2, 3)}


def worker(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn

    from zerolite import ZeroOptimizer

    dist.init_process_group("gloo")

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            each = int(args.elements) // args.count
            self.weights = nn.ParameterList([nn.Parameter(torch.randn(each).bfloat16()) for _ in range(args.count)])

        def forward(self) -> torch.Tensor:
            return torch.stack([weight.sum() for weight in self.weights]).sum()

    model = Sum()
    if args.stage == 0:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: None)
    optimizer = None if args.stage < 1 else ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage=args.stage)
    seconds = []
    for number in range(args.steps + 2):
        dist.barrier()
        start = time.perf_counter()
        model().backward()
        if optimizer is None:
            model.zero_grad()
        else:
            if args.clip:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if number >= 2:
            seconds.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        Path(args.out).write_text(json.dumps({"seconds": seconds}))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--elements", type=float, default=5e6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--clip", action="store_true", help="with torch.nn.utils.clip_grad_norm_, which looks at each gradient")
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        return worker(args)
    found: dict[tuple[int, int], list[float]] = {(stage, count): [] for stage in SIDES for count in COUNTS}
    for _ in range(args.rounds):
        for stage, count in found:
            command = ["benchmarks.small", "--elements", str(args.elements), "--steps", str(args.steps), "--count", str(count)]
            command += ["--stage", str(stage), *(["--clip"] if args.clip else [])]
            result = on_ranks(args.ranks, command, timeout=900)
            if isinstance(result, str):
                raise SystemExit(f"{SIDES[stage]}, {count} parameters: {result}")
            found[stage, count].append(quantile(result["seconds"], 0.5))
    print(f"\n{args.elements:,.0f} bf16 elements, {args.ranks} ranks, clipping {'on' if args.clip else 'off'}")
    print(f"{'milliseconds':30}" + "".join(f"{count:>10,} parameters" for count in COUNTS) + f"{'ratio':>9}")
    rows = []
    for stage in SIDES:
        base = [found[-1, count] if stage >= 0 else [0.0] * args.rounds for count in COUNTS]
        over = [
            [a - b for a, b in zip(found[stage, count], none, strict=True)] for count, none in zip(COUNTS, base, strict=True)
        ]
        mid = [quantile(values, 0.5) * 1e3 for values in over]
        name = SIDES[stage] + ", overhead" * (stage >= 0)
        print(f"{name:30}" + "".join(f"{value:21.1f}" for value in mid) + f"{mid[1] / mid[0]:9.2f}")
        rows.append({"benchmark": "small", "side": name, "elements": args.elements, "ranks": args.ranks, "clip": args.clip})
        rows[-1].update(counts=COUNTS, ms=mid, ratio=mid[1] / mid[0], samples=over)
    print(f"\nstored in {shown(store('small-clip' if args.clip else 'small', rows))}")
    return None


if __name__ == "__main__":
    main()
