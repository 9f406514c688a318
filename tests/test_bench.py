"""The benchmarks' own arithmetic and text: nothing here measures, but for one run of two tiny systems."""

from __future__ import annotations

import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from rows import CONDITIONS, row

from benchmarks import __main__ as benchmarks_command
from benchmarks import (
    compare,
    construct,
    harness,
    largest,
    moments,
    plots,
    reasons,
    report,
    step,
    suite,
    systems,
    tables,
    targets,
)
from benchmarks.models import KNOWN, MODELS, Shape
from benchmarks.progress import Progress
from zerolite import cli


def test_quantiles():
    assert harness.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert harness.quantile([1.0, 2.0], 0.2) == pytest.approx(1.2) and harness.quantile([7.0], 0.8) == 7.0
    assert harness.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 10) == pytest.approx([20, 35, 50])
    assert harness.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2.0


def test_the_union_of_intervals():
    assert step.union([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4 and step.union([]) == 0


def test_a_summary_has_medians_and_every_sample():
    def run(scale_):
        times = {phase: [scale_, 2 * scale_, 3 * scale_] for phase in step.PHASES}
        found = {"times": times, "communication": 0.5, "first": 1.0, "build": 0.5, "losses": [9.0, 8.0], "peak": 5 << 20}
        return {
            **found,
            "base": 1 << 20,
            "rest": 3 << 20,
            "device_peak": None,
            "device_rest": None,
            "plan": None,
            "settings": {},
        }

    shape = Shape("small", 1, 10, 1, 256)
    found = step.summary("x", shape, 2, [run(9), run(1), run(2)], [run(9), run(0.5), run(0.5)])
    assert found["numel"] == 1000 and found["step"] == 9 and found["overheads"] == [3, 9] and found["overhead"] == 6
    assert found["bytes_a_parameter"] == (2 << 20) / 2 / 1000 and found["loss"] == 8.0 and len(found["samples"]) == 2
    assert found["steps"] == pytest.approx([6, 7.5, 12]) and found["tokens_a_second"] == 128 * 2 / 9


def test_systems_are_left_out_by_name_with_a_reason(monkeypatch):
    monkeypatch.setattr(systems, "find_spec", lambda name: None)
    names, missing = systems.choose(None, 2, cuda=False, core=False)
    assert names[0] == systems.ALONE and "zerolite 2" in names and not any(name.startswith("DeepSpeed") for name in names)
    assert missing["DeepSpeed 2"] == "deepspeed is not installed (make peers)" and missing["FlashOptim"] == "needs a GPU"
    assert systems.choose(None, 2, True, False)[1]["FlashOptim"] == "flashoptim is not installed"
    monkeypatch.setattr(systems, "find_spec", lambda name: object())
    assert systems.choose(None, 2, True, False)[1]["FlashOptim"] == "runs on one rank only"
    assert systems.choose("zerolite 2,DDP", 2, False, False)[0] == [systems.ALONE, "DDP + AdamW(fused)", "zerolite 2"]
    assert len([n for n in systems.choose("DeepSpeed", 2, False, False)[0] if n.startswith("DeepSpeed")]) == 8
    with pytest.raises(ValueError, match=r"expected some of .*got \['nothing'\]"):
        systems.choose("nothing", 2, False, False)


@pytest.mark.parametrize(
    "options,words",
    [
        (["--worlds", "0"], "--worlds: expected different numbers of ranks such as 1,2,4, got 0"),
        (["--worlds", "1,x"], "--worlds: expected"),
        (["--worlds", "2,2"], "--worlds: expected different numbers"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--steps", "-1"], "--steps: expected at least 1, got -1"),
        (["--warmup", "-1"], "--warmup: expected at least 0, got -1"),
    ],
)
def test_options_that_nothing_could_run_with(options, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        suite.parse([*options, "--dry-run"])
    assert words in capsys.readouterr().err


def test_a_failing_system_is_a_row_and_the_others_go_on(monkeypatch, tmp_path):
    tries = []

    def launch(system, shape, ranks, steps, **_):
        tries.append(system)
        if system == "DDP + AdamW(fused)":
            return "ImportError: no such thing"
        if system == "zerolite 1" and tries.count(system) == 1:
            return "rank 1 ended by SIGSEGV"
        times = {phase: [0.1] * steps for phase in step.PHASES}
        found = {"times": times, "communication": 0.0, "first": 1.0, "build": 0.5, "losses": [9.0], "peak": 5, "base": 1}
        return {**found, "rest": 3, "device_peak": None, "device_rest": None, "plan": None, "settings": {"key": 1}}

    monkeypatch.setattr(suite, "launch", launch)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    block = suite.Block("small-10k", 2, False, 1, 2, systems="DDP,zerolite 1,FlashOptim")
    out = io.StringIO()
    path = suite.run_block(block, "cpu", Progress([1.0] * 6, out))
    rows = harness.read(path)
    assert [r["benchmark"] for r in rows] == ["step", "step", "skipped", "failed"]
    assert rows[3]["why"] == "ImportError: no such thing" and "DDP + AdamW(fused) failed" in out.getvalue()
    assert tries.count("DDP + AdamW(fused)") == 2 and tries.count("zerolite 1") == 3  # once more each, and a timed round
    assert "zerolite 1 failed and is tried once more: rank 1 ended by SIGSEGV" in out.getvalue()
    assert all(r["model"] == "small-10k" and r["conditions"]["commit"] for r in rows)
    page = report.text(tmp_path)
    assert "Left out: FlashOptim (needs a GPU); DDP + AdamW(fused) (ImportError: no such thing)." in page
    here = {**harness.conditions(), "commit": "abc"}
    monkeypatch.setattr(suite, "commit", lambda: "abc")
    monkeypatch.setattr(harness, "conditions", lambda: here)
    good = [
        {**r, "benchmark": "step", "conditions": here} if r["benchmark"] == "failed" else {**r, "conditions": here}
        for r in rows
    ]

    def kept(rows, device="cpu", block=block):
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return suite.measured(block, device)

    assert kept(good) and not kept(good, block=suite.Block("small-10k", 2, False, 1, 3)) and not kept(good, "cuda")
    assert not kept([{**r, "conditions": here} for r in rows])  # one failed
    assert not kept([r for r in good if r["benchmark"] != "skipped"]) and not kept([])  # what could not run then might now
    for name in ("cpu", "versions", "commit"):
        assert not kept([{**r, "conditions": {**here, name: "other"}} for r in good])
    monkeypatch.setattr(suite, "commit", lambda: "")  # no git here
    assert not kept([{**r, "conditions": {**here, "commit": ""}} for r in good])


def test_the_preset_and_options_make_blocks():
    blocks, parts = suite.selection(suite.parse(["--preset", "full"]))
    assert {(b.model, b.world) for b in blocks} == {(m, w) for m in MODELS for w in (1, 2, 4)} and set(parts) == set(
        suite.PARTS
    )
    blocks, parts = suite.selection(
        suite.parse(["--models", "gpt2-5M", "--worlds", "1,4", "--rounds", "1", "--systems", "DDP"])
    )
    assert [(b.model, b.world, b.rounds, b.systems) for b in blocks] == [("gpt2-5M", w, 1, "DDP") for w in (1, 4)] and not parts
    assert suite.selection(suite.parse(["--parts", "update"])) == ([], ["update"])
    with pytest.raises(SystemExit):
        suite.parse(["--models", "gpt5"])


def test_progress_tells_how_long_is_left():
    out, clock = io.StringIO(), iter([0.0, 10.0])
    progress = Progress([1.0, 3.0], out, lambda: next(clock))
    progress.next("first")
    progress.next("second")
    assert "0/2 first" in out.getvalue() and "1/2 second, 30 s left" in out.getvalue()


@pytest.mark.parametrize("true", [0, 1, 2, 7, 50, 333, 4096, 9999])
@pytest.mark.parametrize("start", [1, 5, 64, 20_000])
def test_bisection(true, start):
    asked = []

    def fits(size):
        assert size not in asked
        asked.append(size)
        return size <= true

    found = largest.bisect(fits, start)
    assert found <= true and min(true, 4096) - found <= max(found * 0.04, 1)
    assert len(asked) <= 24 and (found == 0 or found in asked)


def test_the_search_tells_the_limit_from_a_failure(monkeypatch):
    class Args:
        ranks, width, device, timeout, start, tolerance, checkpoint = 2, 64, "cpu", 1.0, 8, 0.04, True

    def launch(system, shape, ranks, steps, limit, **_):
        assert shape.checkpoint
        if system == "broken":
            return "RuntimeError: no"
        if shape.layers > 11:
            raise harness.OverLimit(limit + 1)
        return {"peak": limit - 1, "losses": [8.0], "settings": {}}

    monkeypatch.setattr(largest, "launch", launch)
    good, bad = largest.search(["fine", "broken"], Args, 1000)
    assert good["layers"] in (10, 11) and good["best"]["loss"] == 8.0 and not all(t["fits"] for t in good["trials"])
    assert bad["benchmark"] == "failed" and bad["why"] == "RuntimeError: no"
    assert good["numel"] == largest.count(good["layers"], 64) and good["checkpoint"]
    other = {name: value for name, value in good.items() if name != "checkpoint"}
    assert compare.key(other) != compare.key(good) and compare.heading(other) != compare.heading(good)
    assert largest.count(3, 64) == largest.grown(3, 64).count()


def test_targets_name_what_is_missed():
    rows = [row("DDP + AdamW(fused)", 0.2), row("DeepSpeed 2", 0.6), row("DeepSpeed 2 + offload", 0.5, first=4.0)]
    rows += [row("zerolite 2", 0.09, peak=3 << 29), row("zerolite 3", 0.01)]
    found = {f"{target.system}: {target}": target.met for target in targets.of_steps(rows)}
    assert found["zerolite 2: overhead of DeepSpeed 2 + offload's 0.180 (at most 0.167)"] is False
    assert found["zerolite 2: overhead of DDP + AdamW(fused)'s 0.450 (at most 0.500)"] is True
    assert found["zerolite 2: peak memory above imports of DeepSpeed 2's 0.500 (at most 0.500)"] is True
    assert found["zerolite 2: first step of DeepSpeed 2's 1.000 (at most 0.500)"] is False
    assert len([name for name in found if name.startswith("zerolite 3")]) == 1  # no peer at stage 3: DDP alone
    text = targets.missed(targets.of_steps(rows))
    assert text.startswith("\nTargets missed in this run:\n\n- zerolite 2: overhead of DeepSpeed 2 + offload's 0.18")

    slowed = [row("DDP + AdamW(fused)", -0.2), *rows[1:]]  # something else ran beside "model alone"
    assert targets.disturbed(slowed) == "model alone took longer than DDP + AdamW(fused)" and not targets.disturbed(rows)
    beside = [
        row(systems.ALONE, 0.0, others=0.5),
        *rows,
    ]  # it takes the same off every overhead, which flatters the smaller ones
    assert targets.disturbed(beside) == "other processes took 0.5 cores while model alone was timed"
    assert {target.metric for target in targets.of_steps(beside)} == {targets.ABOVE, "first"}
    below = [*rows, row("zerolite 1", -0.01), row("DeepSpeed 1", 0.2)]
    assert "overhead" not in {target.metric for target in targets.of_steps(below) if target.system == "zerolite 1"}
    assert {target.metric for target in targets.of_steps(slowed)} == {targets.ABOVE, "first"}
    text = tables.step([slowed], [], [])
    assert "Disturbed: model alone took longer than DDP + AdamW(fused)." in text and "overhead of" not in text

    busy = [{**r, "others": 0.3 if r["system"] == "DeepSpeed 2" else 0.01} for r in rows]
    text = tables.step([busy], [], [])
    assert "Other processes took more than 0.1 cores while these were timed: DeepSpeed 2 (0.3).\n" in text

    def large(system, numel):
        return {"benchmark": "largest", "system": system, "ranks": 2, "numel": numel}

    found = targets.of_largest([large("DeepSpeed 3", 10), large("zerolite 3", 21), large("zerolite 3 + int8 moments", 29)])
    assert [(t.figure, t.met) for t in found] == [(2.1, True), (2.9, False)]


def test_what_was_not_tried_is_told():
    one = {
        "benchmark": "largest",
        "system": "DeepSpeed 1",
        "ranks": 2,
        "numel": 10,
        "layers": 1,
        "limit": 1,
        "width": 64,
        "trials": [],
    }
    page = tables.largest([{**one, "best": None, "checkpoint": True, "conditions": CONDITIONS}])
    assert "with activation checkpointing" in page
    assert "Not among those that were tried: DeepSpeed 0, DeepSpeed 2, DeepSpeed 3, DeepSpeed 1 + offload" in page


def test_small_results_with_and_without_clipping_are_both_shown_and_kept_apart(tmp_path):
    one = {
        "benchmark": "small",
        "side": "stage 1, overhead",
        "elements": 5e6,
        "ranks": 2,
        "counts": [10, 10000],
        "ms": [7.0, 60.0],
    }
    rows = [{**one, "ratio": 8.6, "clip": clip, "conditions": CONDITIONS} for clip in (False, True)]
    for name, r in zip(("small", "small-clip"), rows, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(r) + "\n")
    page = report.text(tmp_path)
    assert "## Many small parameters\n" in page and "## Many small parameters, clipped\n" in page
    assert compare.key(rows[0]) != compare.key(rows[1]) and compare.heading(rows[0]) != compare.heading(rows[1])


def test_offloaded_steps_are_measured_on_a_simulated_device(monkeypatch):
    from benchmarks import device

    monkeypatch.setenv("ZEROLITE_SIMULATE", "0")
    tiny = Shape("gpt2", 2, 64, 2, 256, rows=1, length=8)
    monkeypatch.setitem(KNOWN, "tiny", tiny)
    for way in (device.WAYS[1], device.WAYS[3], device.WAYS[-1]):
        (found,) = device.step_rows(torch.device("cpu"), "tiny", 2, way)
        assert found["benchmark"] == "device" and len(found["samples"]) == 2 and found["a parameter"]["up"] >= 2.0, way
        assert 0 <= found["exposed"] <= 1 and compare.measures(found)


def test_locks_of_killed_ranks_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "CACHE", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert isinstance(harness.on_ranks(1, ["timeit", "--nonsense"], 60), str)
    assert not lock.exists()


def test_reasons_are_told_in_figures():
    rates = {"pack": 0.1, "average of 2 and its square sum": 0.2, "square sum of 2": 0.4, "zerolite": 0.6}
    rates["zerolite, 2 sources"] = 0.8
    passes = [{"side": side, "ns": [0.0, ns, 9.0], "conditions": CONDITIONS} for side, ns in rates.items()]
    rows = [row(systems.ALONE, 0.0, peak=3 << 29), row("DDP + AdamW(fused)", 0.2), row("DeepSpeed 2", 0.6)]
    late = [*rows, row("zerolite 2", 0.15, build=0.25)]
    text = reasons.of_block(late, passes[:3], passes[3:])
    assert "packing 1 ms, averaging with the exact norm 1 and the update 3 take 5 ms" in text  # 5e6 elements
    assert "the norm (2) and the update (4) 7; DeepSpeed 2's sixth is 100." in text
    elsewhere = [{**r, "conditions": {**CONDITIONS, "cpu": "another"}} for r in passes]
    assert "overhead" not in reasons.of_block(late, elsewhere[:3], elsewhere[3:])  # rates of another processor say nothing
    alone = (1 << 29) / 1e7  # bytes a parameter and rank at the model's own peak, of which 9 rest
    assert f"zerolite 2 9.0 + {alone - 9:.1f} = {alone:.1f} (peak {2 * alone:.1f}, bound {alone:.1f})" in text
    assert "zerolite 2 250 of 1000 ms" in text
    assert "overhead" not in reasons.of_block(late, [], [])  # without rates nothing is claimed
    single = [{**r, "ranks": 1} for r in late]
    assert "zerolite 2 0.0 (gradients" in reasons.of_block(single, passes[:3], passes[3:])
    assert reasons.of_block([*rows, row("zerolite 2", 0.01, peak=3 << 29, first=0.1)], passes, []) == ""
    small = [{**r, "shape": {"kind": "small", "layers": 100}} for r in late]
    text = reasons.of_block(small, passes[:3], passes[3:])
    assert "overhead: 10,000 parameters" in text and "zerolite 2" in text and "packing" not in text


def test_the_table_has_every_system_and_the_figures():
    text = tables.step([[row(systems.ALONE, 0.0), row("DDP + AdamW(fused)", 0.2), row("zerolite 2", 0.05)]], [], [])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert re.search(
        r"\| zerolite 2 \| 100 \| 200 \| 50 \| 50 \| 350 \| .*\| 50 \| 0.25 \| 1000 \| 1,000 \| 2147 \| 1074 \| 9.00", text
    )
    assert "of DeepSpeed's best" not in text  # an empty column is left out


class Checker(HTMLParser):
    """Counts open tags, and keeps what loads from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.outside = [], []

    def handle_starttag(self, tag, attrs):
        self.outside += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.outside += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_comparison_is_one_escaped_page():
    a = [row("zerolite 2", 0.2), row("only <here>"), {"benchmark": "skipped", "system": "S&T", "why": "<i>no</i>"}]
    b = [row("zerolite 2", 0.1, conditions={**CONDITIONS, "commit": "<script>alert(1)</script>"})]
    text = compare.page(a, b, ("<old>", "new"))
    checker = Checker()
    checker.feed(text)
    assert not checker.open and not checker.outside
    assert "<script>" not in text and "&lt;script&gt;" in text and "&lt;old&gt;" in text
    assert "left out of A: S&amp;T: &lt;i&gt;no&lt;/i&gt;" in text and "only &lt;here&gt;" in text
    assert '<td class="better">0.500</td>' in text and "a &lt;b&gt;" in text
    with pytest.raises(ValueError, match="in common, got none"):
        compare.page(a[:1], [row("zerolite 3")], ("a", "b"))


def test_the_comparison_says_what_one_side_lacks():
    a = [row("zerolite 2"), row("DDP"), row("FSDP2"), row("zerolite 3", wire=None)]
    b = [row("zerolite 2", step=0.8), row("zerolite 3", peak=None)]
    text = compare.page(a, b, ("a", "b"))
    assert text.count("<li>only in A: <b>step, gpt2-5M, 2 ranks</b>: DDP; FSDP2</li>") == 1 and "only in B" not in text
    assert "<td>zerolite 3</td><td>2,048</td><td>–</td>" in text and "<td>zerolite 3</td><td>–</td><td>1</td>" in text
    assert '<td class="worse">1</td>' in text and 'href="#s0"' in text and 'id="s0"' in text


def test_what_is_measured_does_not_tell_rows_apart():
    a, b = ({"benchmark": "largest", "system": "zerolite 3", "ranks": 2, "numel": n} for n in (100_000_000, 200_000_000))
    assert '<td class="better">2.000</td>' in compare.page([a], [b], ("a", "b"))


def test_conditions_of_several_rows_are_told_once_each():
    a = [row("zerolite 2", conditions={"memory": 2**30, "gpu": None, "commit": c}) for c in ("c1", "c2", "c1")]
    text = compare.page(a, a[:1], ("a", "b"))
    assert "<td>memory</td><td>1.0 GiB</td>" in text and "<td>gpu</td><td>none</td>" in text
    assert "<td>commit</td><th>c1; c2</th><th>c1</th>" in text


def test_forecasts_are_compared_by_model_and_calibrations_are_no_empty_section():
    rows = [{"benchmark": "scale", "kind": "forecast", "model": "7b", "ranks": n, "serial": 1.0} for n in (8, 16)]
    rows.append({"benchmark": "scale", "kind": "calibration", "model": "5M", "ranks": 1, "system": "zerolite 1"})
    text = compare.page(rows, rows, ("a", "b"))
    assert text.count("<h2") == 1 and "<td>ranks 8</td>" in text and "<td>ranks 16</td>" in text


def test_stored_results_become_a_page_and_compare_with_themselves():
    results = Path(harness.ROOT) / "benchmarks" / "results"
    page = report.text(results)
    assert "## The host update" in page and "## A training step" in page
    rows = harness.read(results)
    assert "1.000" in compare.page(rows, rows, ("a", "a"))


# ---- construction


@pytest.mark.parametrize("stage", [1, 3])
def test_every_rank_of_a_large_world_is_built_and_owns_its_part(stage, monkeypatch):
    monkeypatch.setitem(KNOWN, "tiny", Shape("small", 1, 50, 1, 256))
    found = construct.construct("tiny", stage, 16, 1, Progress([1.0] * 16, io.StringIO()))
    assert found["built"] == 16 and found["covered"] and found["numel"] == 5000 and len(found["samples"]) == 16


def test_a_gap_and_an_overlap_are_found():
    construct.check({"w": [(4, 6), (0, 4)]}, {"w": 6})
    for ranges in ([(0, 4), (5, 6)], [(0, 4), (3, 6)], [(0, 4)]):
        with pytest.raises(AssertionError):
            construct.check({"w": ranges}, {"w": 6})


# ---- the command


def test_the_command_finds_the_tree_or_says_where_to_get_it(tmp_path, monkeypatch, capsys):
    assert cli._source_tree([tmp_path, harness.ROOT]) == harness.ROOT
    monkeypatch.setattr(cli, "_source_tree", lambda candidates: None)
    assert cli.main(["bench", "--preset", "quick"]) == 2
    assert "make peers bench" in capsys.readouterr().err


def test_the_list_names_every_command_model_and_system(monkeypatch, capsys):
    """In this process: each of the two interpreters that the command starts imports torch anew."""
    commands = []
    monkeypatch.setattr(cli.subprocess, "call", lambda command, env: commands.append((command, env)) or 0)
    assert cli.main(["bench", "list"]) == 0
    ((command, env),) = commands
    assert command == [sys.executable, "-m", "benchmarks", "list"] and env["PYTHONPATH"].startswith(str(harness.ROOT))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "list"])
    benchmarks_command.main()
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*MODELS, *systems.all_systems(), "compare", "largest", "standard"])


@pytest.mark.timeout(300)
def test_a_real_run_of_two_ranks_has_every_figure():
    shape = Shape("small", 2, 64, 1, 256)
    found = step.launch("zerolite 2", shape, 2, 2, warmup=1, timeout=200)
    assert isinstance(found, dict), found
    assert all(len(found["times"][phase]) == 2 for phase in step.PHASES) and len(found["losses"]) == 1 + 2
    assert found["communication"] > 0 and found["base"] > 0 and found["rest"] > 0 and found["first"] >= found["build"]
    assert found["wire"] is None or found["wire"] > 0
    assert found["settings"]["stage"] == 2 and found["settings"]["chosen"].startswith("stage 2")
    with pytest.raises(harness.OverLimit):
        step.launch("zerolite 2", shape, 2, 1, limit=50 << 20, timeout=200)


def test_overheads_are_drawn_of_the_processor_with_most_rows():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    hosts = ({**CONDITIONS, "cpu": "one"}, {**CONDITIONS, "cpu": "another"})
    rows = [row(name, 0.1, numel=n, conditions=hosts[n > 10]) for name in ("FSDP2", "zerolite 2") for n in (1, 2, 3, 20, 30)]
    rows += [row("FSDP2", 9.0, shape={"kind": "small"}), row("zerolite 2", -0.1)]  # neither is drawn
    figure, axes = pyplot.subplots()
    plots.overhead(axes, rows)
    lines = [(line.get_label(), len(line.get_xdata())) for line in figure.axes[0].get_lines() if len(line.get_xdata())]
    assert lines == [("FSDP2", 3), ("zerolite 2", 3)] and figure.get_suptitle() == "one"
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["FSDP2", "zerolite 2"]
    pyplot.close(figure)


def test_seeds_are_told_apart_by_the_lines_that_the_title_names(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    rows = [
        {"moments": kind, "seed": seed, "losses": [3.0, 2.0 + seed], "parameters": 5e6}
        for seed in range(4)
        for kind in moments.KINDS
    ]
    moments.draw(rows, tmp_path / "a.png")
    figure = pyplot.gcf()
    lines = [line.get_linestyle() for line in figure.axes[0].get_lines()]
    assert len(lines) == 12 and lines[::3] == ["-", "--", ":", "-"] and (tmp_path / "a.png").stat().st_size > 1000
    assert figure.axes[0].get_title().endswith("seeds: solid 0, dashed 1, dotted 2, solid 3")
    pyplot.close(figure)


def test_the_reason_of_a_failure_names_the_signal_and_the_first_error():
    assert harness._reason("a\nValueError: b\nRuntimeError: c\n", [1, None]) == "ValueError: b"
    assert harness._reason("", [None, -11]) == "rank 1 ended by SIGSEGV; no output"
    assert harness._reason("1\n2\n3\n4\n", [0, -6]) == "rank 1 ended by SIGABRT; 2 / 3 / 4"


def test_the_block_that_is_drawn_has_several_ranks():
    rows = [row("a", ranks=ranks, numel=numel) for ranks, numel in ((1, 9), (2, 9), (4, 5))]
    assert plots.largest_block(rows) == rows[1:2]
    assert plots.title(rows[1:]).endswith(" 2 ranks") and plots.title(rows).endswith(" 1 rank")
