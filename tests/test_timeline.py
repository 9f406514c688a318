"""MemoryTimeline: what is recorded, what the peak is made of, what is written, and that nothing stays."""

from __future__ import annotations

import gc
import json
import logging
import re
import weakref
from html.parser import HTMLParser

import pytest
import torch
from models import Run, loss_of, make, tokens_for
from ranks import on_processes, on_threads
from torch import nn

import zerolite
from zerolite import memory as memory_module
from zerolite import timeline as package
from zerolite.comm.local import LocalComm
from zerolite.memory import FINE, KEPT, Process
from zerolite.timeline.page import page as html
from zerolite.timeline.peak import explain, largest_items
from zerolite.timeline.record import TERMS, Recording, Sample, amount, short, stretches, thin


def step(model, optimizer, number=0, rank=0):
    loss_of(model, tokens_for(number, 0, rank)).backward()
    optimizer.step()
    optimizer.zero_grad()


def compared(timeline, optimizer, found):
    """Compares the last sample with memory() at the same moment, at every event."""
    note = timeline._note

    def both(event, name):
        note(event, name)
        memory, sample = optimizer.memory(), timeline.samples[-1]
        assert dict(zip(TERMS, sample.terms, strict=True)) == memory.live_fine, (event, name)
        assert sum(sample.terms) - memory.live_fine[KEPT] == sum(memory.live.values()) == sum(sample.buckets)
        found.append(event)

    optimizer._parts.comm.ledger.listener = both


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_every_sample_equals_memory_at_the_same_moment(stage, world, tmp_path, monkeypatch):
    monkeypatch.setattr(package, "find_spec", lambda name: None)  # no figure, and no walk over mappings: they take seconds
    monkeypatch.setattr(memory_module, "_proportional", lambda: None)

    def body(comm):
        model, optimizer = make(Run(stage=stage, dtype=torch.bfloat16, bucket_mb=4e-3), comm)
        found = []
        with zerolite.MemoryTimeline(optimizer, tmp_path / "memory") as timeline:
            compared(timeline, optimizer, found)
            for number in range(2):
                step(model, optimizer, number, comm.rank)
        rest = timeline.recording.planned
        return found, timeline.peak, rest, optimizer.plan

    for found, peak, planned, plan in on_threads(world, body):
        wanted = {"pack", "exchange", "update", "backward", "step", "zero_grad"}
        wanted |= {"gather", "release"} if plan.params.sharded else set()
        wanted |= {"publish"} if plan.states.sharded and not plan.params.sharded else set()
        assert wanted <= set(found) <= wanted | {"average"}
        assert {term: sum(planned[part] for part in parts) for term, parts in FINE.items()} == plan.bytes_at_rest
        assert peak.sample.live >= plan.bytes_at_rest["params"] + plan.bytes_at_rest["states"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_events_come_in_the_order_of_a_step(stage, tmp_path):
    model, optimizer = make(Run(stage=stage), LocalComm())
    with zerolite.MemoryTimeline(optimizer, tmp_path / "memory") as timeline:
        step(model, optimizer)
    labels = [sample.label for sample in timeline.samples]
    phases = [label for label in labels if label.split()[-1] in ("begin", "end") or label in ("start", "stop", "zero_grad")]
    assert phases == [
        *("start", "forward begin", "forward end", "backward begin", "backward end"),
        *("step begin", "step end", "zero_grad", "stop"),
    ]
    for bucket in (b.name for b in optimizer._trained):
        places = [labels.index(f"{event} {bucket}") for event in ("pack", "exchange", "update", "publish")[: 3 + (stage < 3)]]
        assert places == sorted(places)
        in_backward = labels.index("backward begin") < labels.index(f"exchange {bucket}") < labels.index("backward end")
        assert in_backward == optimizer.plan.grads.sharded
    if optimizer.plan.params.sharded:
        first = labels.index("gather blocks.0 0")
        assert labels.index("forward begin") < first < labels.index("release blocks.0 0") < labels.index("forward end")
    seconds = [sample.seconds for sample in timeline.samples]
    assert seconds == sorted(seconds)
    by_phase = {sample.event: sample.phase for sample in timeline.samples}
    assert by_phase["update"] == "update" and by_phase["zero_grad"] == "other"
    assert stretches(timeline.samples)[-1][1] == seconds[-1]


def test_whole_units_are_counted_while_they_are_whole(tmp_path):
    def body(comm):
        model, optimizer = make(Run(stage=3), comm)
        with zerolite.MemoryTimeline(optimizer, tmp_path / "memory") as timeline:
            step(model, optimizer, 0, comm.rank)
        bucket = next(b for b in optimizer._trained if b.name == "blocks.1 0")
        whole = bucket.layout.numel * 4
        at = timeline.recording.buckets.index("blocks.1 0")
        samples = timeline.samples
        gathered = next(k for k, s in enumerate(samples) if s.label == "gather blocks.1 0")
        grown = samples[gathered].buckets[at] - samples[gathered - 1].buckets[at]
        return grown == whole, samples[-1].terms[TERMS.index("units")]

    assert on_threads(2, body) == [(True, 0)] * 2


# ---- the peak


def recording(terms, planned, **changes):
    options = {"bucket_mb": 25.0, "states whole": False, "grads whole": False, "params whole": False, "moments": {}}
    options |= {"states on device": False, **changes}
    sizes = {"ranks": 4, "buckets": 2, "largest bucket": 300, "largest parameter": 100}
    record = Recording({}, {term: planned.get(term, 0) for term in TERMS}, sizes, options)
    record.highest = Sample(1.5, "backward", "pack", "h.1 0", tuple(terms.get(t, 0) for t in TERMS), (), Process())
    record.at_peak = {"h.0 0": {**dict.fromkeys(TERMS, 0), "units": 40}, "h.1 0": {**dict.fromkeys(TERMS, 0), **terms}}
    return record


REST = {"params": 100, "master": 100, "moments": 400, "grads": 100}


def test_the_peak_is_explained_from_its_terms():
    peak = explain(recording({**REST, "grads": 50, "flight": 2000, "units": 60}, REST, moments={"bf16": 0.5, "int8": 0.25}))
    assert "2.6 KiB, 1.500 s after the start, in backward, when bucket 'h.1 0' was packed" in peak.text
    assert "moments 400 B" in peak.text and "buckets in flight 2.0 KiB" in peak.text
    assert "2.0 KiB above the 700 B that the plan rests at" in peak.text
    assert "more whole units in use 60 B and buckets in flight 2.0 KiB; less gradients at rest 50 B." in peak.text
    assert "Largest items: 'h.1 0' 2.0 KiB (buckets in flight), 'h.1 0' 400 B (moments)" in peak.text
    assert [cure.split(":")[0].split(" 0.")[0] for cure in peak.cures] == [
        "a bucket_mb below",
        "moments='bf16' or moments='int8' rounds Adam's moments",
    ]


@pytest.mark.parametrize(
    "terms,options,first",
    [
        ({"master": 500, "moments": 500}, {"states whole": True}, "stage=1"),
        ({"grads": 900}, {"grads whole": True}, "stage=2"),
        ({"params": 900}, {"params whole": True}, "stage=3"),
        ({"units": 900}, {}, "units=("),
        ({"flight": 900}, {}, "a bucket_mb below 0.000286 (now 25)"),
        ({"kept": 900}, {}, "a bucket_mb below"),
        ({"moments": 900}, {"moments": {"bf16": 0.5}}, "moments='bf16'"),
        ({"moments": 900}, {"states on device": True}, "offload='states'"),
    ],
)
def test_what_would_lower_the_peak_follows_from_the_largest_term(terms, options, first):
    assert explain(recording({**{"params": 10}, **terms}, REST, **options)).cures[0].startswith(first)


def test_nothing_is_proposed_that_saves_nothing():
    assert explain(recording({"params": 1000}, REST)).cures == []
    alone = recording({"params": 1000}, REST, **{"params whole": True})
    alone.sizes["ranks"] = 1
    assert explain(alone).cures == []


@pytest.mark.parametrize("term,words", [("grads", "stage=2 or higher cuts"), ("params", "stage=3 cuts")])
def test_no_stage_above_the_highest_is_proposed(term, words):
    assert explain(recording({term: 900}, REST, **{f"{term} whole": True})).cures[0].startswith(words)


def test_of_equal_items_what_does_not_rest_comes_first():
    assert largest_items({"a": {"moments": 9}, "b": {"flight": 9}}, 1) == [("b", "flight", 9)]


def test_largest_items_and_amounts():
    assert largest_items({"a": {"params": 3, "units": 0}, "b": {"params": 9}}) == [("b", "params", 9), ("a", "params", 3)]
    assert [amount(n) for n in (0, 1023, 1024, 300 * 1024, 2**20, 5 * 2**30)] == [
        *("0 B", "1,023 B", "1.0 KiB", "300 KiB", "1.0 MiB", "5.00 GiB"),
    ]


def test_thinning_keeps_the_ends_and_the_peak():
    samples = [Sample(k / 100, "other", "x", "", (k * (k != 700) + 9999 * (k == 700),), (), Process()) for k in range(1000)]
    kept = thin(samples, 100)
    assert len(kept) <= 102 and kept[0] is samples[0] and kept[-1] is samples[-1] and samples[700] in kept
    assert thin(samples, 1000) == samples


# ---- files


class Page(HTMLParser):
    """Tags, and what refers to elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_is_whole_without_network_and_script(tmp_path):
    pytest.importorskip("matplotlib")
    model, optimizer = make(Run(stage=3, bucket_mb=4e-3), LocalComm())
    with zerolite.MemoryTimeline(optimizer, tmp_path / "deep" / "memory") as timeline:
        step(model, optimizer)
    names = [f"memory.{end}" for end in ("json", "html", "png")]
    assert [path.name for path in timeline.files] == names
    text = timeline.files[1].read_text()
    page = Page(text)
    assert page.links == [] and "http" not in text and page.tags.count("svg") == 3 and page.tags.count("table") == 3
    assert all(bucket.name in text for bucket in optimizer._parts.buckets) and "Peak of live bytes" in text
    raw = json.loads(timeline.files[0].read_text())
    assert raw["peak"] == timeline.peak.text and len(raw["samples"]) == len(timeline.samples)
    assert raw["samples"][3]["terms"] == list(timeline.samples[3].terms)
    assert timeline.files[2].read_bytes().startswith(b"\x89PNG")


def drawn(count, length, buckets=2, change=10, name="h"):
    """A page of `count` samples over `length` seconds, and its text; a bucket changes at every `change`th sample."""
    record = recording({"params": 10 * 2**20}, REST)
    record.conditions, record.buckets = {"stage": 3}, [f"{name}.{k} 0" for k in range(buckets)]
    record.at_peak = {bucket: dict.fromkeys(TERMS, 0) for bucket in record.buckets}
    for k in range(count):
        held = tuple(2**20 + (k % change == 0) * (row + 1) for row in range(buckets))
        live = (5 * 2**20,) + (k % change,) * (len(TERMS) - 1)
        record.samples.append(Sample(k * length / (count - 1), "forward", "gather", "h.0 0", live, held, Process(10**9 + k)))
    return html(record, explain(record))


def test_one_time_is_at_one_place_in_all_figures():
    boxes = re.findall(r'viewBox="(\S+) \S+ (\S+) \S+"', drawn(50, 2.0))
    assert len(boxes) == 3 and len(set(boxes)) == 1


@pytest.mark.parametrize("length,wanted", [(3000.0, "1000 s"), (2.5, "0.5 s"), (0.05, "5 ms"), (0.0002, "0.02 ms")])
def test_numbers_of_the_time_axis(length, wanted):
    text = drawn(20, length)
    assert f">{wanted}</text>" in text and not re.search(r">[\d.]+e[+-]\d+ m?s<", text)


def test_a_long_recording_is_a_page_that_opens():
    """Level stretches cost nothing, and of many samples a fixed number is drawn."""
    assert len(drawn(20_000, 60.0, buckets=80, change=200)) < 1_200_000


def test_names_from_the_model_are_escaped(tmp_path):
    model = torch.nn.ModuleDict({"<b>": torch.nn.Linear(3, 3)})
    optimizer = zerolite.ZeroOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, stage=2, process_group=LocalComm())
    optimizer._parts.buckets[0].name = "</script><b>"
    with zerolite.MemoryTimeline(optimizer, tmp_path / "memory"):
        model["<b>"](torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert (tmp_path / "memory.html").read_text().count("</script>") == 2


def test_files_are_written_when_the_block_raises(tmp_path):
    model, optimizer = make(Run(), LocalComm())
    with pytest.raises(KeyError, match="mine"), zerolite.MemoryTimeline(optimizer, tmp_path / "memory") as timeline:
        loss_of(model, tokens_for(0, 0, 0)).backward()
        raise KeyError("mine")
    assert (tmp_path / "memory.html").exists() and timeline.samples[-1].label == "stop KeyError"
    assert optimizer._parts.comm.ledger.listener is None and not model._forward_pre_hooks
    optimizer.step()


class Dollars(nn.Module):
    """Modules whose names are formulas, or would end a page's script."""

    def __init__(self):
        super().__init__()
        self.add_module("$\\frac$", nn.Sequential(nn.Linear(3, 3)))
        self.add_module("<!--<script>", nn.Sequential(nn.Linear(3, 3)))

    def forward(self, x):
        for part in self.children():
            x = part(x)
        return x


def test_names_that_are_formulas_are_drawn_as_they_are(tmp_path):
    model = Dollars()
    optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage=3)
    with zerolite.MemoryTimeline(optimizer, tmp_path / "memory") as timeline:
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
    page = next(path for path in timeline.files if path.suffix == ".html").read_text()
    script = page[page.rindex('<script type="application/json"') :]
    assert "<!--" not in script and json.loads(script[script.index(">") + 1 : script.index("</script>")])
    assert any(path.suffix == ".png" for path in timeline.files)


def test_the_error_of_the_block_is_the_one_that_is_seen(tmp_path, monkeypatch, caplog):
    _, optimizer = make(Run(stage=3), LocalComm())

    def broken(self, suffix):
        raise ValueError("cannot draw")

    monkeypatch.setattr(zerolite.MemoryTimeline, "_write", broken)
    with pytest.raises(KeyError, match="its own"), zerolite.MemoryTimeline(optimizer, tmp_path / "memory"):
        raise KeyError("its own")
    assert "could not be written (cannot draw)" in caplog.text
    with pytest.raises(ValueError, match="cannot draw"), zerolite.MemoryTimeline(optimizer, tmp_path / "memory"):
        pass
    for path in ("", ".", "/", ".."):
        with pytest.raises(ValueError, match="path: expected a folder and the beginning of files' names"):
            zerolite.MemoryTimeline(optimizer, path)


def test_without_matplotlib_the_rest_is_written_and_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(package, "find_spec", lambda name: None)
    monkeypatch.setattr(package, "_told", set())
    model, optimizer = make(Run(), LocalComm())
    with caplog.at_level(logging.WARNING, "zerolite"):
        for number in range(2):
            with zerolite.MemoryTimeline(optimizer, tmp_path / str(number)):
                step(model, optimizer, number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.html", "0.json", "1.html", "1.json"]
    assert [record.message.count("is not drawn") for record in caplog.records] == [1]


def test_past_the_limit_the_peak_is_still_found_and_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "LIMIT", 10)
    model, optimizer = make(Run(stage=3), LocalComm())
    with zerolite.MemoryTimeline(optimizer, tmp_path / "memory") as timeline:
        step(model, optimizer)
    assert len(timeline.samples) == 11 and timeline.recording.dropped > 0
    assert timeline.recording.highest.live > max(sample.live for sample in timeline.samples)
    assert "after the limit" in (tmp_path / "memory.html").read_text()


# ---- mistakes, and what stays


def test_mistakes_are_refused(tmp_path):
    model, optimizer = make(Run(), LocalComm())
    with pytest.raises(TypeError, match="expected a ZeroOptimizer, got SGD"):
        zerolite.MemoryTimeline(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match="ranks: expected 'first' or 'all', got 'some'"):
        zerolite.MemoryTimeline(optimizer, ranks="some")
    with pytest.raises(RuntimeError, match="expected a timeline that was entered"):
        _ = zerolite.MemoryTimeline(optimizer).peak
    with zerolite.MemoryTimeline(optimizer, tmp_path / "first") as first:
        with pytest.raises(RuntimeError, match="one timeline of an optimizer at a time"):
            zerolite.MemoryTimeline(optimizer, tmp_path / "second").__enter__()
        step(model, optimizer)
    assert any(sample.event == "update" for sample in first.samples) and not (tmp_path / "second.html").exists()
    with pytest.raises(RuntimeError, match="got one that has ended"):
        first.__enter__()


@pytest.mark.parametrize("stage", [0, 3])
def test_a_timeline_keeps_nothing_alive(stage, tmp_path):
    model, optimizer = make(Run(stage=stage), LocalComm())
    with zerolite.MemoryTimeline(optimizer, tmp_path / "memory") as timeline:
        step(model, optimizer)
    kept = [weakref.ref(p) for p in model.parameters()] + [weakref.ref(optimizer), weakref.ref(model)]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in kept if ref() is not None] == [] and timeline.peak.sample.live > 0


# ---- ranks


def two_ranks(rank, folder, stage, ranks):
    model, optimizer = make(Run(stage=stage, dtype=torch.bfloat16, bucket_mb=4e-3), None)
    found = []
    with zerolite.MemoryTimeline(optimizer, f"{folder}/memory", ranks=ranks) as timeline:
        compared(timeline, optimizer, found)
        for number in range(2):
            step(model, optimizer, number, rank)
    kept = timeline.samples[-1].terms[TERMS.index(KEPT)]
    return [path.name for path in timeline.files], kept, timeline.samples[0].process.proportional, len(found)


@pytest.mark.parametrize("stage,ranks,env", [(2, "all", {}), (3, "first", {"ZEROLITE_SHARED": "0"})])
def test_ranks_of_processes(stage, ranks, env, tmp_path):
    results = on_processes(2, two_ranks, str(tmp_path), stage, ranks, env=env)
    for rank, (files, kept, proportional, events) in enumerate(results):
        suffix = f"-rank{rank}" if ranks == "all" else ""
        wanted = [] if ranks == "first" and rank else [f"memory{suffix}.json", f"memory{suffix}.html"]
        assert files[:2] == wanted and events > 20 and proportional > 0
        assert (kept > 0) == (not env)  # slots of shared memory stay, messages do not


def groups_of_one(rank, folder, ranks):
    group = [torch.distributed.new_group([r]) for r in range(2)][rank]
    model, optimizer = make(Run(), group)
    with zerolite.MemoryTimeline(optimizer, f"{folder}/memory", ranks=ranks) as timeline:
        step(model, optimizer)
    return [path.name for path in timeline.files][:1]


def test_files_are_named_by_the_rank_in_the_run_not_in_the_optimizers_group(tmp_path):
    assert on_processes(2, groups_of_one, str(tmp_path), "all") == [["memory-rank0.json"], ["memory-rank1.json"]]
    assert on_processes(2, groups_of_one, str(tmp_path), "first") == [["memory.json"], []]


def test_a_smaller_bucket_is_not_proposed_for_one_parameter():
    one = recording({"flight": 900}, REST)
    one.sizes |= {"largest bucket": 128, "largest parameter": 128}
    assert not any("bucket_mb" in cure for cure in explain(one).cures)


def test_long_names_keep_their_end():
    assert [short(name, 5) for name in ("h.1 0", "block.1 0")] == ["h.1 0", "….1 0"]
    assert "…" in drawn(20, 1.0, name="n" * 80) and "n" * 80 in drawn(20, 1.0, name="n" * 80)
