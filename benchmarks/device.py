"""What a GPU and its bus give, and how near zerolite comes: kernels, copies, an offloaded step.

    zerolite bench device [--device cuda] [--elements 256e6] [--rounds 9] [--model llama-1.5B]

kernels   GB/s of the fused update on the device beside a plain copy of as much memory (target: 88 % of it)
bus       GB/s of pinned host memory, each way and both at once
traffic   bytes a parameter that one offloaded step moves each way, and at what rate (target: 2 bytes, 85 % of the bus)
step      seconds of an offloaded step, and how much of it the update adds to forward and backward (target: 15 %)
host      bytes of host memory a parameter, as planned and as the process holds them

`--device cpu` runs the same on a CPU that plays a device: it shows that the command works, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Row, quantile, quantiles, shown, store
from benchmarks.models import KNOWN
from benchmarks.suite import left_out
from zerolite import ZeroOptimizer, kernels
from zerolite.buffer import Link, Reached, Room, link_for
from zerolite.memory import process_memory
from zerolite.moments import MOMENTS

BF16 = torch.bfloat16


class Clock:
    """Times calls on a device: CUDA events, or the wall on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def seconds(self, call: Callable[[], Any], rounds: int) -> list[float]:
        """Each of `rounds` calls, after two that do not count."""
        found = []
        for number in range(rounds + 2):
            self.wait()
            start = time.perf_counter()
            if self.cuda:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                call()
                last.record()
                self.wait()
                took = first.elapsed_time(last) / 1e3
            else:
                call()
                took = time.perf_counter() - start
            if number >= 2:
                found.append(took)
        return found

    def steps(self, call: Callable[[], Any], rounds: int, settle: Callable[[], Any] = lambda: None) -> list[float]:
        """Each of `rounds` training steps, one directly after the other, after two that do not count: what goes on beside the
        training loop is waited for by the next step, not between two, and after the last one (settle)."""
        marks = []
        for _ in range(rounds + 2):
            if self.cuda:
                torch.cuda.current_stream().synchronize()  # as a loop does that reads its loss
            marks.append(time.perf_counter())
            call()
        settle()
        self.wait()
        marks.append(time.perf_counter())
        return [stop - start for start, stop in itertools.pairwise(marks)][2:]

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def row(part: str, name: str, seconds: list[float], moved: float, **more: Any) -> Row:
    """One line: seconds at p20, p50, p80 and GB/s at the median."""
    found = {"benchmark": "device", "part": part, "name": name, "seconds": quantiles(seconds), "samples": seconds}
    return {**found, "bytes": moved, "GB/s": moved / quantile(seconds, 0.5) / 1e9, **more}


def kernel_rows(device: torch.device, n: int, rounds: int) -> list[Row]:
    """The fused update beside a copy of the same bytes."""
    clock, room = Clock(device), Room(device)
    source = torch.ones(13 * n // 2, dtype=BF16, device=device)  # 13 bytes an element: copied, as many as an update moves
    out = torch.empty_like(source)
    rows = [row("kernels", "copy", clock.seconds(functools.partial(out.copy_, source), rounds), 26.0 * n)]
    del source, out
    param = torch.ones(n, dtype=BF16, device=device)
    rest = torch.zeros(n, dtype=torch.int16, device=device)
    grads = [torch.full((n,), 1e-3, dtype=BF16, device=device) for _ in range(2)]
    spans, step = torch.tensor([[0, n, 0]]), (1.0, 0.0, 0.999, 0.1, 0.999, 0.001, 1e-8, 1e-3, 1.0)
    for name, width in (("fp32", 26.0), ("bf16", 18.0), ("int8", 14.0625)):
        moments = MOMENTS[name](n, room)
        for count in (1, 2):
            call = lambda m=moments, k=count: m.update(param, rest, grads[:k], spans, [step], 1.0 / k)  # noqa: E731
            rows.append(
                row(
                    "kernels",
                    f"update, {name} moments, {count} source(s)",
                    clock.seconds(call, rounds),
                    (width + 2 * (count - 1)) * n,
                )
            )
    sums = torch.zeros(1, kernels.LIMBS, dtype=torch.int64, device=device)
    squares = clock.seconds(lambda: kernels.square_sum_(sums.zero_(), grads[:1], spans, 1.0), rounds)
    rows.append(row("kernels", "square sum", squares, 2.0 * n))
    for found in rows[1:]:
        found["of a copy"] = found["GB/s"] / rows[0]["GB/s"]
    return rows


def bus_rows(device: torch.device, n: int, rounds: int) -> list[Row]:
    """Copies between pinned host memory and the device."""
    clock, link = Clock(device), link_for(device)
    host, there = link.host.zeros(n, BF16), torch.zeros(n, dtype=BF16, device=device)
    other, away = link.host.zeros(n, BF16), torch.zeros(n, dtype=BF16, device=device)

    def both() -> None:
        marks = link.down(host, there), link.up(away, other, Reached())
        for mark in marks:
            mark.wait()

    return [
        row("bus", "down", clock.seconds(lambda: link.down(host, there).wait(), rounds), 2.0 * n),
        row("bus", "up", clock.seconds(lambda: link.up(away, other, Reached()).wait(), rounds), 2.0 * n),
        row("bus", "both ways", clock.seconds(both, rounds), 4.0 * n),
    ]


class Counted:
    """A link that counts bytes, and on CUDA the seconds of each copy."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.moved = {"down": 0, "up": 0}
        self.spans: dict[str, list[tuple[Any, Any, int]]] = {"down": [], "up": []}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.link, name)

    def down(self, out: torch.Tensor, source: torch.Tensor, *more: Any, **options: Any) -> Any:
        return self._copy("down", source, lambda: self.link.down(out, source, *more, **options))

    def up(self, out: torch.Tensor, source: torch.Tensor, *more: Any, **options: Any) -> Any:
        return self._copy("up", source, lambda: self.link.up(out, source, *more, **options))

    def _copy(self, way: str, source: torch.Tensor, copy: Callable[[], Any]) -> Any:
        self.moved[way] += source.numel() * source.element_size()
        return copy()


@contextlib.contextmanager
def counted() -> Iterator[list[Counted]]:
    """Every optimizer that is built inside has a counting link."""
    from zerolite import check

    links: list[Counted] = []
    before = check.link_for

    def make(device: torch.device) -> Any:
        links.append(Counted(before(device)))
        return links[-1]

    check.link_for = make  # type: ignore[assignment]
    try:
        yield links
    finally:
        check.link_for = before


def step_rows(device: torch.device, name: str, rounds: int, options: dict[str, Any]) -> list[Row]:
    """An offloaded step beside the model alone."""
    clock, shape = Clock(device), KNOWN[name]
    model = shape.build().to(device)
    batch = torch.randint(0, 256, (shape.rows, shape.length), device=device)

    def alone() -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        model.zero_grad()

    base = clock.steps(alone, rounds)
    with counted() as links:
        optimizer = ZeroOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-4), model, **options)

    def step() -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    took = clock.steps(step, rounds, optimizer._parts.updates.settle)
    optimizer.state_dict()
    numel, steps = optimizer.plan.numel, rounds + 2
    mid, alone_mid = quantile(took, 0.5), quantile(base, 0.5)
    ways = getattr(optimizer._parts.updates, "ways", [])
    held = process_memory(device, True).proportional
    more = {
        "model": name,
        "options": {key: str(value) for key, value in options.items()},
        "alone": quantiles(base),
        "exposed": max(mid - alone_mid, 0.0) / mid,
        "a parameter": {way: value / steps / numel for way, value in links[0].moved.items()},
        "gradients": optimizer.plan.grads.home,
        "host a parameter": {"planned": optimizer.plan.host_peak / numel, "process": held / numel if held else None},
        "updated by": {way.name: way.done for way in ways},
        "rates, ns an element": {way.name: (way.rate or 0.0) * 1e9 for way in ways},
    }
    moved = sum(links[0].moved.values()) / steps
    result = [row("step", f"{name}, {options}", took, moved, **more)]
    optimizer.remove_hooks()
    return result


WAYS: list[dict[str, Any]] = [
    {"stage": 2, "offload": "states", "update": "host"},
    {"stage": 2, "offload": "states", "update": "stream"},
    {"stage": 2, "offload": "states", "update": "auto"},
    {"stage": 2, "offload": "states", "update": "host", "gradients": "host"},
    {"stage": 2, "offload": "states", "update": "stream", "gradients": "host"},
    {"stage": 2, "offload": "states", "update": "auto", "gradients": "host"},
    {"stage": 2, "offload": "states", "update": "auto", "gradients": "device"},
    {"stage": 2, "offload": "states", "update": "auto", "overlap": False},
    {"stage": 2, "offload": "states", "update": "auto", "moments": "int8"},
    {"stage": 2, "offload": "states", "update": "auto", "resident": "auto"},
    {"stage": 3, "offload": "all", "update": "auto"},
]


def show(found: Row) -> None:
    low, mid, high = found["seconds"]
    extra = f"{found['of a copy']:7.0%} of a copy" if "of a copy" in found else ""
    if "exposed" in found:
        each = found["a parameter"]
        extra = f"  exposed {found['exposed']:.0%}, {each['down']:.2f} down and {each['up']:.2f} up a parameter"
        extra += f", host {found['host a parameter']['planned']:.2f} planned"
    times = "".join(f"{value * 1e3:10.2f}" for value in (low, mid, high))
    print(f"{found['part']:9}{found['name']:76}{times} ms{found['GB/s']:9.1f} GB/s{extra}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="zerolite bench device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--elements", type=float, default=256e6)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model", default="llama-1.5B", help=f"one of {', '.join(KNOWN)}")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "zerolite bench device: expected a GPU, got none (torch.cuda.is_available() is False). Or --device cpu."
        )
    if args.model not in KNOWN:
        parser.error(f"--model: expected one of {', '.join(KNOWN)}, got {args.model!r}")
    if args.device == "cpu":
        os.environ.setdefault("ZEROLITE_SIMULATE", "0")
    device, n = torch.device(args.device), int(args.elements) // 64 * 64
    rows: list[Row] = []
    for part in (lambda: kernel_rows(device, n, args.rounds), lambda: bus_rows(device, n, args.rounds)):
        rows += part()
    failed: list[str] = []
    for way in WAYS:
        try:
            rows += step_rows(device, args.model, args.rounds, way)
        except Exception as error:  # told, and the others run
            failed.append(f"{way}: {type(error).__name__}: {error}")
            rows.append(left_out(f"{args.model}, {way}", 1, failed[-1], "failed"))
        gc.collect()  # a model and its optimizer are a cycle
        if args.device == "cuda":
            torch.cuda.empty_cache()
    for found in rows:
        if found["benchmark"] == "device":
            show(found)
    if args.device == "cuda":  # figures of a CPU that plays a device mean nothing
        print(f"stored in {shown(store(f'device-{args.model}', rows))}")
    if failed:
        raise SystemExit("failed: " + "\n        ".join(failed))


if __name__ == "__main__":
    main()
