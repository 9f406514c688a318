"""MemoryTimeline: what is held when, by term and by unit, and why the peak is what it is."""

from __future__ import annotations

import json
import logging
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from zerolite.hooks import Hooks
from zerolite.memory import FINE, KEPT, fine_plan, live_by_bucket, process_memory
from zerolite.moments import MOMENTS
from zerolite.timeline.figure import draw
from zerolite.timeline.page import page
from zerolite.timeline.peak import Peak, explain
from zerolite.timeline.record import TERMS, VERBS, Recording, Sample

if TYPE_CHECKING:
    from zerolite.optimizer import ZeroOptimizer

log = logging.getLogger("zerolite")

LIMIT = 20_000  # samples that are kept: some hundred steps of a model of thirty buckets
_PHASES = ("forward", "backward", "step")  # events with a begin and an end
_told: set[str] = set()  # messages that were given once


class MemoryTimeline:
    """Records memory at every verb of the steps inside, and writes PATH.png, PATH.html and PATH.json at the end.

        with zerolite.MemoryTimeline(optimizer, path="out/memory") as timeline:
            for batch in batches: ...  # a few steps
        print(timeline.peak.text)

    Args:
        optimizer: the ZeroOptimizer whose steps are recorded; nothing refers to it after the end.
        path: where to write, without an extension. Files are written also where the block raises.
        ranks: "first": rank 0 writes; "all": every rank writes, with `-rankR` in the name. All ranks may enter, or one.

    Each event costs a walk over the live tensors (`recording.seconds_recording` sums it, and it is left out of the
    times shown); outside of a timeline a verb costs one comparison. Raises RuntimeError where another timeline of
    this optimizer is under way, TypeError and ValueError for wrong arguments.
    """

    recording: Recording  # what was recorded so far
    files: list[Path]  # what was written

    def __init__(self, optimizer: ZeroOptimizer, path: str | Path = "out/memory", *, ranks: str = "first") -> None:
        if getattr(optimizer, "_built", None) is None:
            raise TypeError(f"optimizer: expected a ZeroOptimizer, got {type(optimizer).__name__}. Wrap the optimizer first.")
        if ranks not in ("first", "all"):
            raise ValueError(f"ranks: expected 'first' or 'all', got {ranks!r}")
        if Path(path).name in ("", ".."):
            raise ValueError(f"path: expected a folder and the beginning of files' names, such as 'out/memory', got '{path}'")
        self._optimizer: ZeroOptimizer | None = optimizer
        self._hooks = Hooks()
        self._phase = "other"
        self._began = 0.0
        self.path = Path(path)
        self.ranks = ranks
        self.files = []
        self.recording = Recording({}, {}, {}, {})

    @property
    def samples(self) -> list[Sample]:
        """Samples so far."""
        return self.recording.samples

    @property
    def peak(self) -> Peak:
        """The highest sample, explained; inside the block the highest so far."""
        if self.recording.highest is None:
            raise RuntimeError(
                "peak: expected a timeline that was entered, got one without samples. Use it in a with statement."
            )
        return explain(self.recording)

    def __enter__(self) -> MemoryTimeline:
        if self._optimizer is None:
            raise RuntimeError("MemoryTimeline: expected a new one, got one that has ended. Make one for each with statement.")
        built = self._optimizer._parts
        if built.comm.ledger.listener is not None:
            raise RuntimeError(
                f"MemoryTimeline('{self.path}'): expected one timeline of an optimizer at a time, got a second one inside the "
                "first. Leave the first before the second begins."
            )
        self.recording = _conditions(self._optimizer)
        self._began = time.perf_counter()
        self._note("start", "")
        built.comm.ledger.listener = self._note
        if built.model is not None:
            self._hooks.on_forward(built.model, self._note)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        assert self._optimizer is not None
        comm = self._optimizer._parts.comm
        comm.ledger.listener = None
        rank = dist.get_rank() if dist.is_initialized() else comm.rank  # in the run, not in the optimizer's group
        self._hooks.remove()
        self._note("stop", "" if kind is None else kind.__name__)
        self._optimizer = None
        if self.ranks == "first" and rank != 0:
            return
        try:
            self._write(f"-rank{rank}" if self.ranks == "all" else "")
        except Exception as problem:
            if kind is None:
                raise
            log.warning("zerolite: the timeline could not be written (%s); the error of the block follows", problem)

    def _note(self, event: str, name: str) -> None:
        """Takes one sample: the ledger's listener."""
        began = time.perf_counter()
        assert self._optimizer is not None
        buckets = self._optimizer._parts.buckets
        found, kept = live_by_bucket(buckets)
        fine = {term: sum(held[term] for held in found.values()) for parts in FINE.values() for term in parts}
        fine[KEPT] = kept
        record = self.recording
        record.buckets += [bucket for bucket in found if bucket not in record.buckets]
        boundary = name in ("begin", "end") or event in ("start", "stop")
        sample = Sample(
            seconds=began - self._began - record.seconds_recording,
            phase=self._enter(event, name),
            event=event,
            name=name,
            terms=tuple(fine[term] for term in TERMS),
            buckets=tuple(sum(held.values()) for held in found.values()),
            process=process_memory(buckets[0].full.device, boundary),
        )
        if record.highest is None or sample.live > record.highest.live:
            record.highest, record.at_peak = sample, found
        if len(record.samples) < LIMIT or event == "stop":
            record.samples.append(sample)
        else:
            record.dropped += 1
        record.seconds_recording += time.perf_counter() - began

    def _enter(self, event: str, name: str) -> str:
        """The phase that an event belongs to; a begin changes the one that follows."""
        phase = self._phase
        if event in _PHASES:
            self._phase = event if name == "begin" else "other"
        return VERBS.get(event, phase) if phase == "step" else phase

    def _write(self, suffix: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stem = self.path.name + suffix

        def file(end: str) -> Path:
            path = self.path.with_name(stem + end)
            self.files.append(path)
            return path

        record, peak = self.recording, self.peak
        file(".json").write_text(json.dumps({**record.as_json(), "peak": peak.text, "cures": peak.cures}))
        file(".html").write_text(page(record, peak), encoding="utf-8")
        if find_spec("matplotlib") is None:
            if "matplotlib" not in _told:
                _told.add("matplotlib")
                log.warning(
                    "zerolite: %s.png is not drawn: matplotlib is not installed; the HTML page has the figure", self.path
                )
            return
        draw(record, peak, file(".png"))


def _conditions(optimizer: ZeroOptimizer) -> Recording:
    """An empty recording with all that is known at the start."""
    built, plan = optimizer._parts, optimizer.plan
    layouts = [(layout, width.param) for layout, width, *_ in plan.rows]
    largest = max((slot.numel * width for layout, width in layouts for slot in layout.slots), default=0)
    device = built.buckets[0].full.device
    rule = built.rule
    storage = getattr(rule, "storage", None)  # of AdamRule: moments can be rounded
    widths = {name: kind.width + kind.group_width / 64 for name, kind in MOMENTS.items()}
    now = widths[next(name for name, kind in MOMENTS.items() if kind is storage)] if storage is not None else 0.0
    bucket_mb = built.checked.limit / 2**20
    conditions = {
        "stage": plan.stage,
        "offload": plan.offload or "off",
        "rank": f"{built.comm.rank} of {plan.size}",
        "parameters": f"{plan.numel:,}",
        "compute dtype": ", ".join(dict.fromkeys(str(b.full.dtype).removeprefix("torch.") for b in built.buckets)),
        "optimizer": type(optimizer._inner).__name__,
        "moments": next((name for name, kind in MOMENTS.items() if kind is storage), "of the optimizer"),
        "bucket_mb": f"{bucket_mb:g}",
        "buckets": len(built.buckets),
        "memory of ranks": "shared" if any(b.home is not None for b in built.buckets) else "each its own",
        "device": str(device),
        "torch": torch.__version__,
    }
    return Recording(
        conditions=conditions,
        planned=fine_plan(plan, built.buckets),
        sizes={
            "ranks": plan.size,
            "buckets": len(built.buckets),
            "largest bucket": max((layout.numel * width for layout, width in layouts), default=0),
            "largest parameter": largest,
        },
        options={
            "bucket_mb": bucket_mb,
            "states whole": not plan.states.sharded,
            "grads whole": not plan.grads.sharded,
            "params whole": not plan.params.sharded,
            "moments": {name: width / now for name, width in widths.items() if now and width < now},
            "states on device": device.type != "cpu" and plan.states.home == "device",
        },
    )


__all__ = ["MemoryTimeline", "Peak", "Recording", "Sample"]
