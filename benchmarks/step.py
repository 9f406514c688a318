"""One training run: seconds by part, memory, bytes sent and losses of one system on one model. The suite calls it.

    python -m benchmarks.step [--model gpt2-49M] [--ranks 2] [--systems "zerolite 2,DDP"] [--rounds 3] [--steps 8]

Every system runs in fresh processes, A B C A B C ...; a round's overhead is its step minus that round's "model alone"
(forward and backward in as many processes, without communication). One more round, not timed, samples memory.

forward, backward, update   wall time of rank 0
communication               within those: time during which a collective, or a wait in shared memory, is under way in rank 0.
                            Of two more steps under torch.profiler, which are not timed
first                       from the model in memory to the end of the first step: construction included
peak, rest                  physical memory of all ranks: largest sample, and after the steps; base: before the model is built
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, loopback, on_ranks, physical, quantile, quantiles
from benchmarks.models import KNOWN, Shape

PHASES = ("forward", "backward", "update")
PROFILED = 2  # steps


# ---- in a rank


def worker(args: argparse.Namespace) -> None:
    """One rank: runs the steps and, on rank 0, writes what was measured to args.out."""
    import torch
    import torch.distributed as dist

    from benchmarks.systems import Job, all_systems

    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    os.environ["DS_ACCELERATOR"] = device.type
    dist.init_process_group("nccl" if cuda else "gloo")
    shape = Shape(**json.loads(args.shape))
    system = all_systems()[args.system]
    for package in ("zerolite", "transformers", system.package):
        if package:
            importlib.import_module(package)  # before the base, so that imports are nobody's memory
    warm_up(shape)
    memory = Memory(device)
    base = memory.rest()
    made = Timed(shape.build)
    begin = time.perf_counter()
    trained = system.run(Job(made, device, shape.rows, args.lean))
    memory.sync()
    build = time.perf_counter() - begin - made.seconds
    run = Run(trained, shape, device)
    run.steps(1)
    first = build + sum(times[0] for times in run.times.values())
    run.steps(max(args.warmup - 1, 0))
    dist.barrier()
    lines, sent = loopback(), trained.sent() if trained.sent else 0
    run.times = {phase: [] for phase in PHASES}
    run.steps(args.steps)
    dist.barrier()
    after = loopback()
    found: Row = {"build": build, "first": first, "times": run.times, "settings": trained.settings, "plan": trained.plan}
    if not cuda and lines is not None and after is not None:
        found["wire"] = (after - lines) / args.steps / dist.get_world_size()
    if trained.sent:
        found["sent"] = (trained.sent() - sent) / args.steps
    found["losses"] = mean_over_ranks(run.losses, device)
    found |= {"base": base[0], "rest": memory.rest()[0], "device_peak": memory.peak(), "device_rest": memory.rest()[1]}
    if args.profile:
        run.times = {phase: [] for phase in PHASES}  # under the profiler steps are slower: not among the others
        found["communication"] = communication(lambda: run.steps(PROFILED)) / PROFILED
    if dist.get_rank() == 0:
        Path(args.out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def warm_up(shape: Shape) -> None:
    """A backward of a tiny model of the same kind: what torch and transformers load at first use is in the base."""
    tiny = replace(shape, layers=1, width=64, heads=2, words=64)
    batch = tiny.batch(torch_generator(0))
    tiny.build()(input_ids=batch, labels=batch).loss.backward()


def torch_generator(seed: int) -> Any:
    import torch

    return torch.Generator().manual_seed(seed)


class Timed:
    """Builds the model, and says how long that took: it is no system's time."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make, self.seconds = make, 0.0

    def __call__(self) -> Any:
        start = time.perf_counter()
        try:
            return self.make()
        finally:
            self.seconds += time.perf_counter() - start


class Run:
    """Steps of a system on batches that differ by rank; seconds by phase and losses."""

    def __init__(self, trained: Any, shape: Shape, device: Any) -> None:
        import torch
        import torch.distributed as dist

        self.trained, self.shape, self.device = trained, shape, device
        self.generator = torch_generator(dist.get_rank())
        self.times: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.losses: list[float] = []
        self.sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def steps(self, count: int) -> None:
        for _ in range(count):
            batch = self.shape.batch(self.generator).to(self.device)
            marks = [self._now()]
            loss = self.trained.forward(batch)
            marks.append(self._now())
            self.trained.backward(loss)
            marks.append(self._now())
            self.trained.update()
            marks.append(self._now())
            self.losses.append(float(loss.detach()))
            for phase, start, stop in zip(PHASES, marks, marks[1:], strict=False):
                self.times[phase].append(stop - start)

    def _now(self) -> float:
        self.sync()
        return time.perf_counter()


class Memory:
    """Bytes of all ranks together: physical memory of the processes, and of the device."""

    def __init__(self, device: Any) -> None:
        import torch

        self.device = device
        self.sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def rest(self) -> tuple[int, int | None]:
        """What is held now, once what was freed is given back."""
        import torch
        import torch.distributed as dist

        from zerolite.host import trim_heap

        gc.collect()
        trim_heap()
        held = torch.cuda.memory_allocated() if self.device.type == "cuda" else None
        return self._sum(physical([os.getpid()], dist.get_world_size())), None if held is None else self._sum(held)

    def peak(self) -> int | None:
        """The most that the device's allocator gave out."""
        import torch

        return self._sum(torch.cuda.max_memory_allocated()) if self.device.type == "cuda" else None

    def _sum(self, value: int) -> int:
        import torch
        import torch.distributed as dist

        total = torch.tensor([value], device=self.device)
        dist.all_reduce(total)
        return int(total)


def mean_over_ranks(values: list[float], device: Any) -> list[float]:
    import torch
    import torch.distributed as dist

    total = torch.tensor(values, device=device)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def communication(call: Callable[[], None]) -> float:
    """Seconds of `call` during which a collective or a wait in shared memory is under way in this process."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from zerolite.comm.shared import SharedComm

    wait = SharedComm.wait_for

    def named(self: SharedComm, ready: Callable[[float], bool], what: str) -> None:
        with record_function("shared:wait"):
            wait(self, ready, what)

    SharedComm.wait_for = named  # type: ignore[method-assign]
    try:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            call()
    finally:
        SharedComm.wait_for = wait  # type: ignore[method-assign]
    # As the profiler has them: its events() makes an object of each, gigabytes with 10,000 parameters.
    events = [e for e in seen.profiler.kineto_results.events() if e.name().startswith(("gloo:", "nccl:", "shared:"))]
    return union([(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events]) * 1e-9


def union(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(stop - max(start, reached), 0.0)
        reached = max(reached, stop)
    return total


# ---- around the ranks


def launch(
    system: str, shape: Shape, ranks: int, steps: int, *, warmup: int = 2, device: str = "cpu", lean: bool = False,
    sample: bool = False, limit: int | None = None, timeout: float = 900.0,
) -> Row | str:  # fmt: skip
    """Runs one system once; what rank 0 measured, or why it failed. Raises OverLimit (see on_ranks)."""
    command = ["benchmarks.step", "--worker", system, "--shape", json.dumps(asdict(shape)), "--steps", str(steps)]
    command += ["--warmup", str(warmup), "--device", device, *(["--lean"] if lean else [])]
    command += [] if sample or limit is not None else ["--profile"]
    return on_ranks(ranks, command, timeout, sample, limit=limit)


def summary(system: str, shape: Shape, ranks: int, runs: list[Row], base: list[Row]) -> Row:
    """One row of a system: medians over rounds, and every sample. runs[0] sampled memory; the others are timed."""
    timed, numel = runs[1:], shape.count()
    phases = {p: quantile([quantile(run["times"][p], 0.5) for run in timed], 0.5) for p in PHASES}
    steps = [sum(values) for run in timed for values in zip(*(run["times"][p] for p in PHASES), strict=True)]
    over = [mid(run) - mid(other) for run, other in zip(timed, base[1:], strict=False)]
    last = timed[-1]
    row: Row = {"benchmark": "step", "system": system, "numel": numel, "ranks": ranks, **phases}
    row |= {"communication": quantile([run["communication"] for run in timed], 0.5), "step": quantile([*map(mid, timed)], 0.5)}
    row |= {"steps": quantiles(steps), "overhead": quantile(over, 0.5), "overheads": over}
    row["others"] = max((run["others"] for run in timed if "others" in run), default=0.0)
    row["tokens_a_second"] = shape.tokens * ranks / row["step"]
    row |= {"first": quantile([run["first"] for run in timed], 0.5), "build": quantile([run["build"] for run in timed], 0.5)}
    row |= {"losses": last["losses"], "loss": last["losses"][-1], "wire": last.get("wire"), "sent": last.get("sent")}
    row |= {name: runs[0][name] for name in ("peak", "base", "rest", "device_peak", "device_rest", "plan", "settings")}
    row["bytes_a_parameter"] = (runs[0]["rest"] - runs[0]["base"] + (runs[0]["device_rest"] or 0)) / ranks / numel
    row["peak_a_parameter"] = (runs[0]["peak"] - runs[0]["base"] + (runs[0]["device_peak"] or 0)) / ranks / numel
    return {**row, "shape": asdict(shape), "samples": [run["times"] for run in timed]}


def mid(run: Row) -> float:
    """Seconds of a step of one run."""
    return sum(quantile(run["times"][p], 0.5) for p in PHASES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", help="comma-separated names or beginnings of names; default: all")
    parser.add_argument("--model", choices=KNOWN, default="gpt2-49M")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    for name in ("--shape", "--worker", "--out"):
        parser.add_argument(name, dest={"--worker": "system"}.get(name, name[2:]), help=argparse.SUPPRESS)
    for name in ("--lean", "--profile"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.system:
        return worker(args)
    from benchmarks.suite import main as suite

    options = {"models": args.model, "worlds": args.ranks, "rounds": args.rounds, "steps": args.steps, "warmup": args.warmup}
    options |= {"systems": args.systems, "device": args.device, "parts": "step"}
    suite([text for name, value in options.items() if value is not None for text in (f"--{name}", str(value))])
    return None


if __name__ == "__main__":
    main()
