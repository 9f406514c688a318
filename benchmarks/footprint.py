"""Process memory against the plan: the physical memory of all ranks after steps, less the same processes with a tiny model.

    python -m benchmarks.footprint [--ranks 2] [--millions 200]

The base is measured in the same processes after a whole step of a tiny model, so that imports, the process group and
what torch sets up at first use are in it. Activations and autograd's gradients are gone when it is measured: the heap
is trimmed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.harness import on_ranks, shown, store
from benchmarks.step import Memory


def worker(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn

    import zerolite

    dist.init_process_group("gloo")
    memory = Memory(torch.device("cpu"))

    def trained(width: int, depth: int) -> tuple[nn.Module, zerolite.ZeroOptimizer]:
        with zerolite.meta_init():
            model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
        optimizer = zerolite.ZeroOptimizer(
            torch.optim.AdamW(model.parameters()), model, stage=args.stage, moments=args.moments, param_dtype=torch.bfloat16
        )
        for _ in range(2):
            model(torch.randn(2, width, dtype=torch.bfloat16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    small = trained(64, 3)
    base, _ = memory.rest()
    del small
    depth = max(round(args.millions * 1e6 / 2048**2), 1)
    kept = trained(2048, depth)
    (whole, _), plan = memory.rest(), kept[1].plan
    planned = sum(plan.used(home, peak=False, host=True) for home in ("device", "host"))
    if dist.get_rank() == 0:
        found = {"numel": plan.numel, "base": base, "process": whole, "planned": planned}
        Path(args.out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--millions", type=float, default=200)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--moments", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        return worker(args)
    rows = []
    print(f"{'':24}{'planned, MB':>14}{'process - base, MB':>20}{'ratio':>9}")
    for stage in (1, 2, 3):
        for moments in ("fp32", "int8"):
            command = ["benchmarks.footprint", "--millions", str(args.millions), "--stage", str(stage), "--moments", moments]
            found = on_ranks(args.ranks, command, timeout=600)
            if isinstance(found, str):
                raise SystemExit(f"stage {stage}, moments {moments}: {found}")
            grown = found["process"] - found["base"]
            name = f"stage {stage}, moments {moments}"
            ratio = grown / found["planned"]
            print(f"{name:24}{found['planned'] / 1e6:14.1f}{grown / 1e6:20.1f}{ratio:9.3f}")
            rows.append({"benchmark": "footprint", "side": name, "ranks": args.ranks, **found, "ratio": ratio})
    print(f"\nstored in {shown(store('footprint', rows))}")
    return None


if __name__ == "__main__":
    main()
