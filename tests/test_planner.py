"""Choosing a plan: sizes and counts as text, limits, refusals, rates, stage "auto" and the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import Net, seeded, train_on
from models import Run as R
from ranks import on_threads
from torch import nn

import zerolite
from zerolite import auto, cli, cost, partition, rates
from zerolite.comm.local import LocalComm
from zerolite.shapes import Counted, model_of, parse_bytes, parse_count

SLOW_LINK = {"fp32": 0.5, "bf16": 0.6, "int8": 0.7, "average": 10.0, "link": 0.5}


@pytest.fixture(autouse=True)
def given_rates(tmp_path, monkeypatch):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(SLOW_LINK))
    monkeypatch.setenv("ZEROLITE_RATES", str(path))
    return path


@pytest.mark.parametrize(
    "text,value",
    [
        ("80G", 80 * 10**9),
        ("512GiB", 512 * 2**30),
        ("1.5T", 15 * 10**11),
        ("10 kb", 10**4),
        (7, 7),
        ("1e9", 10**9),
        (None, None),
    ],
)
def test_sizes(text, value):
    assert parse_bytes(text, "size") == value


@pytest.mark.parametrize("text", ["80X", "", "-1G", "1.2.3G", 0, -3, True, "0", ".", "1e999", float("inf"), float("nan")])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="device_bytes: expected a size such as '80G'"):
        zerolite.plan(1000, device_bytes=text)


def test_rates_are_measured_on_the_cpu_whatever_the_default_device_is():
    with torch.device("meta"):  # whose ops do nothing, in no time
        found = rates.measure()
    assert all(value > 0.01 for value in (found.fp32, found.bf16, found.int8)) and found.average < 1e4


def test_a_limit_of_a_device_that_a_cpu_has_not_is_refused():
    with pytest.raises(ValueError, match="device_bytes: expected device='cuda', got 'cpu'"):
        zerolite.plan(1000, device="cpu", device_bytes="8G")


def test_counts():
    assert [parse_count(x) for x in ("7e9", "7B", 7e9, "350M", "1.5T")] == [7 * 10**9] * 3 + [350 * 10**6, 15 * 10**11]
    assert [parse_count(x) for x in ("0.5B", ".5b", "5e+8")] == [5 * 10**8] * 3
    for count in (1, 13, 1000, 7 * 10**9):
        assert sum(p.numel() for p in Counted(count).parameters()) == count
    assert len(Counted(7 * 10**9).blocks) == 32
    with pytest.raises(ValueError, match=r"expected an nn.Module, a transformers config.*gpt2-xl.*got 'gpt9'"):
        model_of("gpt9")
    with pytest.raises(ValueError, match=r"below 1e\+16, got '1e30'"):
        parse_count("1e30")


@pytest.mark.parametrize(
    "options,words",
    [
        ({"world": 0}, "world: expected a whole number of at least 1, got 0"),
        ({"world": 6, "ranks_per_host": 4}, "ranks_per_host: expected a divisor of world=6, got 4"),
        ({"device": "tpu"}, "device: expected 'cpu' or 'cuda', got 'tpu'"),
        ({"bucket_mb": 0}, "bucket_mb: expected more than 0"),
        ({"bucket_mb": float("inf")}, "bucket_mb: expected more than 0, and finite, got inf"),
        ({"stage": 2, "resident": 0.5}, "resident=0.5: expected offload='states'"),
        ({"stage": 3, "offload": "all", "resident": 0.5}, "resident=0.5: expected offload='states'"),
        ({"update": "strem"}, "update: expected one of 'auto', 'host', 'stream', got 'strem'"),
        ({"stage": 4}, "stage: expected 0, 1, 2 or 3, got 4"),
        ({"stage": 2, "offload": "all"}, "needs sharded parameters"),
        ({"stage": 2, "moments": "int4"}, "moments: expected one of 'fp32', 'bf16', 'int8', got 'int4'"),
        ({"stage": "auto", "moments": ["fp32"]}, r"moments: expected one of 'fp32', 'bf16', 'int8', got \['fp32'\]"),
        ({"bucket_mb": 1e308}, "bucket_mb: expected more than 0, and finite"),
        ({"clip": "yes"}, "clip: expected True or False, got 'yes'"),
        ({"param_dtype": torch.int8}, "param_dtype: expected None"),
    ],
)
def test_options_that_are_wrong(options, words):
    with pytest.raises(ValueError, match=words):
        zerolite.plan(10**6, **options)


def test_configs_names_and_modules_agree(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=100)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    plans = [zerolite.plan(source, world=2, stage=3) for source in (config, str(tmp_path), tmp_path / "config.json", model)]
    assert all(plan == plans[0] for plan in plans)
    assert zerolite.plan("gpt2", stage=0).numel == 124_439_808
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    assert zerolite.plan(config, stage=0, batch={"input_ids": tokens, "labels": tokens}).setting.activations > 0
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"other.json: expected a transformers config with a 'model_type', got '\[1\]'"):
        zerolite.plan(tmp_path / "other.json")


ODD = {
    "no heads": ({"n_head": 0}, "expected values that AutoModelForCausalLM builds a model from, got ZeroDivisionError"),
    "negative": ({"n_embd": -4}, "builds a model from, got RuntimeError: Trying to create tensor with negative"),
    "a text": ({"n_layer": "x"}, "expected values of a transformers config, got StrictDataclassFieldValidationError"),
    "too many": ({"vocab_size": 10**20}, "builds a model from, got TypeError"),
}


def rows(text):
    """A table's rows without the modelled time, which is the machine's, and what it leads to."""
    lines = [line for line in text.splitlines() if re.match(r" +[0-3] ", line)]
    return [re.sub(r"\s+[\d.]+ (?:ms|us|s)\s", " ", line).replace("<- recommended", "").split() for line in lines]


def test_the_tables_of_the_page_are_what_the_command_prints(capsys, given_rates):
    pytest.importorskip("transformers")
    page = (Path(__file__).parent.parent / "docs" / "plan.md").read_text()
    blocks = re.findall(r"```\n\$ zerolite ([^\n]*)\n(.*?)\n```", page, flags=re.DOTALL)
    assert len(blocks) == 2
    for command, text in blocks:
        assert cli.main(command.split()) == 0
        assert rows(capsys.readouterr().out) == rows(text) != []


@pytest.mark.parametrize("what", ODD)
def test_configs_of_no_model_are_one_line(what, tmp_path, capsys):
    pytest.importorskip("transformers")
    values, message = ODD[what]
    config = {"model_type": "gpt2", "n_embd": 12, "n_layer": 1, "n_head": 2, "vocab_size": 11, **values}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["plan", str(tmp_path)]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[transformers]")]
    assert len(told) == 1 and message in told[0] and len(told[0]) < 500


def test_a_config_without_transformers_names_the_cure(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers, or plan from a count"):
        zerolite.plan("gpt2")


def test_auto_takes_the_fastest_that_fits_and_says_why():
    free = zerolite.plan(10**9, world=4)
    assert free.stage == 1 and "no limit was given" in free.notes[0]  # no message between ranks of a host
    tight = zerolite.plan(10**9, world=4, host_bytes=free.host_peak - 1)
    assert tight.stage != free.stage and tight.host_peak < free.host_peak
    assert any("passed over: stage 1" in note and "bytes of host memory missing" in note for note in tight.notes)
    assert "chosen:" in str(tight)
    rounded = zerolite.plan(10**9, world=4, host_bytes="15G", moments="auto")
    assert rounded.host_peak <= 15 * 10**9 and rounded.at_rest("states") < tight.at_rest("states")


def test_optimizers_that_the_wrapper_would_refuse():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for optimizer, kind, words in [
        (torch.optim.SGD, TypeError, r"optimizer: expected a torch\.optim\.Optimizer instance or None, got <class"),
        (torch.optim.AdamW(nn.Linear(2, 2).parameters()), ValueError, "optimizer: expected one of the model's parameters"),
        (torch.optim.AdamW(model[1].parameters()), ValueError, r"parameter '0\.weight': stage 3 shards every parameter"),
    ]:
        with pytest.raises(kind, match=words):
            zerolite.plan(model, stage=3, optimizer=optimizer)
    assert zerolite.plan(model, stage=2, optimizer=optimizer).bytes_at_rest
    for lazy in (
        lambda: zerolite.plan(nn.LazyLinear(4)),
        lambda: zerolite.ZeroOptimizer(torch.optim.AdamW(nn.LazyLinear(4).parameters())),
    ):
        with pytest.raises(ValueError, match=r"parameter '.*': expected one with a shape, got a lazy one"):
            lazy()


def test_stages_may_be_any_number_and_units_any_iterable():
    assert (
        zerolite.plan(10**6, stage=2.0).terms
        == zerolite.plan(10**6, stage=torch.tensor(2)).terms
        == zerolite.plan(10**6, stage=2).terms
    )
    model = nn.Sequential(*[nn.Linear(300, 300) for _ in range(4)])
    with pytest.raises(ValueError, match=r"does not fit.*No stage or offload fits, nor up to 256 times as many hosts"):
        zerolite.plan(model, world=4, stage=3, units=(kind for kind in [nn.Linear]), host_bytes=3 * 10**6)


@pytest.mark.parametrize("world", [1, 2])
def test_more_ranks_that_are_recommended_are_planned_on_as_many_hosts(world):
    with pytest.raises(ValueError) as caught:
        zerolite.plan("125M", world=world, host_bytes="600M")
    near = re.search(r"stage 3 with ([0-9]+) ranks on ([0-9]+) hosts \(ranks_per_host=([0-9]+)\)", str(caught.value))
    ranks, hosts, here = map(int, near.groups())
    assert ranks == hosts * here and here == world
    assert zerolite.plan("125M", stage=3, world=ranks, ranks_per_host=here, host_bytes="600M").host_peak <= 600e6


def test_what_cannot_fit_is_refused_with_the_three_nearest():
    with pytest.raises(ValueError) as caught:
        zerolite.plan("7B", world=8, stage=0, device_bytes="80G", host_bytes="512G", param_dtype=torch.bfloat16)
    text = str(caught.value)
    assert "stage 0 on 8 rank(s) does not fit: device memory: expected at most 80,000,000,000 bytes a rank" in text
    assert "missing" in text and text.split("The nearest that fit: ")[1].count(";") == 2 and "stage 1" in text
    with pytest.raises(ValueError, match=r"The nearest that fit: stage [0-9].* with [0-9]+ ranks"):
        zerolite.plan("7B", world=2, device_bytes="8G", host_bytes="8G", param_dtype=torch.bfloat16)


@pytest.mark.parametrize("text", ['{"fp32": true}', '{"fp32": Infinity}', "[" * 100_000, '{"tries": Infinity}'])
def test_a_cache_that_holds_something_else_is_measured_again(text, tmp_path, monkeypatch, given_rates):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ZEROLITE_RATES", raising=False)
    calls = []
    monkeypatch.setattr(rates, "measure", lambda: calls.append(1) or rates.Rates(1.0, 1.0, 1.0, 1.0, 1.0))
    whole = {"fp32": 1.0, "bf16": 1.0, "int8": 1.0, "average": 1.0, "link": 1.0, "load": 0.0, "tries": 1}
    rates.cache_path().parent.mkdir(parents=True)
    rates.cache_path().write_text(text if text[0] == "[" else json.dumps(whole | json.loads(text)))
    assert rates.rates().fp32 == 1.0 and calls == [1]


def test_a_cache_that_cannot_be_replaced_leaves_nothing_behind(tmp_path, monkeypatch, given_rates):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ZEROLITE_RATES", raising=False)
    monkeypatch.setattr(rates, "measure", lambda: rates.Rates(1.0, 1.0, 1.0, 1.0, 1.0))
    rates.cache_path().mkdir(parents=True)  # in the way
    assert rates.rates().fp32 == 1.0
    assert list(rates.cache_path().parent.iterdir()) == [rates.cache_path()]


def test_a_machine_that_does_not_reach_itself_is_taken_as_slow(monkeypatch, caplog):
    """Nothing waits for a connection that cannot come."""

    def unreachable(*args, **options):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(rates.socket, "create_connection", unreachable)
    assert rates._link() == 1.0 and "Network is unreachable" in caplog.text
    monkeypatch.undo()
    assert rates._link(1 << 20) > 0.01


def test_rates_are_measured_once_and_cached(tmp_path, monkeypatch, given_rates):
    monkeypatch.delenv("ZEROLITE_RATES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rates, "_load", lambda: 0.0)
    start = time.process_time()
    first = rates.rates()
    assert time.process_time() - start < 10  # processor time of all threads; about 1 s by the clock
    monkeypatch.setattr(rates, "measure", lambda: pytest.fail("measured twice"))
    assert rates.rates() == first and rates.cache_path().is_file()
    monkeypatch.setattr(rates, "measure", lambda: first)
    rates.cache_path().write_text("{")
    assert rates.rates() == first and rates.read(rates.cache_path()) == first
    monkeypatch.setenv("ZEROLITE_RATES", str(given_rates))
    assert rates.rates().link == 0.5
    given_rates.write_text('{"link": 0}')
    with pytest.raises(ValueError, match=r"expected numbers for .*Delete the file"):
        rates.rates()


def test_rates_that_were_measured_on_a_busy_machine_are_measured_again_and_the_best_stay(tmp_path, monkeypatch):
    monkeypatch.delenv("ZEROLITE_RATES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loads, calls = [3.0, 2.0, 0.1], []
    runs = [rates.Rates(2.0, 2.0, 2.0, 5.0, 1.0), rates.Rates(3.0, 1.0, 2.0, 4.0, 2.0), rates.Rates(1.0, 2.0, 2.0, 4.0, 2.0)]
    monkeypatch.setattr(rates, "_load", lambda: loads[len(calls)])
    monkeypatch.setattr(rates, "measure", lambda: calls.append(None) or runs[len(calls) - 1])
    assert rates.rates() == runs[0]
    assert rates.rates() == rates.Rates(2.0, 1.0, 2.0, 5.0, 2.0)
    for _ in range(3):  # the third found the machine idle
        assert rates.rates() == rates.Rates(1.0, 1.0, 2.0, 5.0, 2.0)
    assert len(calls) == 3 and rates.read(rates.cache_path()) == rates.rates()
    loads[:] = [9.0] * 99
    rates.cache_path().unlink()
    monkeypatch.setattr(rates, "measure", lambda: calls.append(None) or runs[0])
    for _ in range(20):
        rates.rates()
    assert len(calls) == 3 + rates.TRIES
    rates.cache_path().write_text(rates.cache_path().read_text().replace('"load": 9.0', '"load": "high"'))
    with pytest.raises(ValueError, match="expected numbers of at least 0"):
        rates.read(rates.cache_path())


def test_auto_in_an_optimizer_is_the_same_on_every_rank_and_gives_the_same_bits():
    results = on_threads(2, train_on, R(stage="auto", dtype=torch.bfloat16))
    for result, expected in zip(results, on_threads(2, train_on, R(stage=2, dtype=torch.bfloat16)), strict=True):
        assert all(torch.equal(value, expected["params"][name]) for name, value in result["params"].items())

    def body(comm):
        model = seeded(Net)
        return zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage="auto", process_group=comm).plan

    plans = on_threads(2, body)
    assert plans[0] == plans[1] and any("chosen: stage" in note for note in plans[0].notes)


@pytest.mark.parametrize("stage,free,total", [("auto", 1000, 10**12), (1, 10**12, 1000)])
def test_an_optimizer_that_cannot_fit_is_refused_before_anything_changes(stage, free, total, monkeypatch):
    monkeypatch.setattr(auto, "usable_memory", lambda: (free, total))
    model = seeded(Net)
    places = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"does not fit: host memory: .* missing"):
        zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage=stage, process_group=LocalComm())
    assert places == [p.data_ptr() for p in model.parameters()]


def test_the_command_line_tells_its_version_and_sizes_without_a_unit(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"zerolite {zerolite.__version__}"
    for option in ("--host-mem", "--device-mem"):
        assert cli.main(["plan", "--params", "7B", option, "16"]) == 2
        assert f"{option}: expected a size such as 80G or 512GiB, got 16, which is 16 bytes" in capsys.readouterr().err


def test_options_that_a_plan_does_not_have():
    with pytest.raises(TypeError, match=r"zerolite\.plan: expected options of \['batch', .*'world'\], got 'wrld'"):
        zerolite.plan("7B", wrld=2)


def test_the_command_line_prints_a_table_and_the_same_as_json(capsys):
    pytest.importorskip("transformers")
    assert cli.main(["plan", "gpt2-xl", "--world", "8", "--device-mem", "8G", "--host-mem", "512G"]) == 0
    text = capsys.readouterr().out
    assert text.count("<- recommended") == 1 and "no: device lacks" in text and "1,557,611,200 parameters in bfloat16" in text
    rows = [line for line in text.splitlines() if line.lstrip()[:1].isdigit() and "B  " in line]
    assert len({line.index("  ", 60) > 0 for line in rows}) == 1 and all(len(line) <= 128 for line in text.splitlines())
    assert cli.main(["plan", "gpt2-xl", "--world", "8", "--device-mem", "8G", "--host-mem", "512G", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["plans"]) == 27 and [p["recommended"] for p in found["plans"]].count(True) == 1
    assert {p["gradients"] for p in found["plans"] if p["offload"] == "states" and p["stage"]} == {"device"}
    options = ["plan", "gpt2-xl", "--world", "8", "--device-mem", "8G", "--host-mem", "512G", "--gradients", "host", "--json"]
    assert cli.main(options) == 0
    host = json.loads(capsys.readouterr().out)["plans"]
    assert {p["gradients"] for p in host if p["offload"]} == {"host"}
    best = next(p for p in found["plans"] if p["recommended"])
    plan = zerolite.plan("gpt2-xl", world=8, stage=best["stage"], device="cuda", param_dtype=torch.bfloat16)
    assert best["bytes_peak"] == plan.bytes_peak and best["bytes_at_rest"] == plan.bytes_at_rest


def test_the_command_line_plans_steps_in_the_backward(capsys):
    assert cli.main(["plan", "--params", "1e8", "--world", "4", "--host-mem", "8G", "--step-in-backward"]) == 0
    text = capsys.readouterr().out
    assert "stage=3, step_in_backward=True, param_dtype=torch.bfloat16" in text and "gradients  " not in text
    assert [line.split()[:3] for line in text.splitlines() if "yes" in line] == [
        ["3", "-", m] for m in ("fp32", "bf16", "int8")
    ]


def test_the_line_to_add_has_the_bucket_size_and_odd_dtypes_are_named(capsys):
    options = ["plan", "gpt2", "--world", "2", "--host-mem", "64G"]
    assert cli.main(options) == 0
    assert "bucket_mb" not in capsys.readouterr().out
    assert cli.main([*options, "--bucket-mb", "2.5"]) == 0
    assert "param_dtype=torch.bfloat16, bucket_mb=2.5)" in capsys.readouterr().out
    with pytest.raises(TypeError, match=r"parameter 'weight': expected float32, bfloat16 or float16, got torch.float64"):
        zerolite.plan(nn.Linear(2, 2, dtype=torch.float64))


def test_the_command_line_ends_quietly_where_nobody_reads_on():
    read, write = os.pipe()
    os.close(read)  # as `zerolite plan ... | head` ends
    command = [sys.executable, "-c", "import sys; from zerolite.cli import main; sys.exit(main())", "plan", "--params", "1e9"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_line_says_what_is_wrong(capsys, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text('{"model_type": "gpt2", ')
    assert cli.main(["plan", "--params", "7e9", "--host-mem", "1G"]) == 1
    assert "Nothing fits: more hosts (--world, --ranks-per-host) what each of them holds" in capsys.readouterr().out
    for arguments, words in [
        ([], "expected one of a name or path, --config or --params, got 0"),
        (["--params", "x"], "parameters: expected a count"),
        (["--params", "1e999"], "parameters: expected a count"),
        (["--params", "."], "parameters: expected a count"),
        (["--params", "7e9", "--bucket-mb", "inf"], "bucket_mb: expected more than 0, and finite"),
        (["--config", "gpt2"], "--config: expected the path of a config.json or of its folder, found nothing at 'gpt2'"),
        (["--params", "7e9", "--host-mem", "1Q"], "--host-mem: expected a size"),
        (["gpt2", "--batch", "4"], "--batch: expected rows x length"),
        (["gpt2", "--batch", "4x1025"], "--batch: expected a length of at most 1024, the config's max_position_embeddings"),
        (["no-such-model"], "expected an nn.Module"),
        (["gpt2-xxl"], "got 'gpt2-xxl'. Did you mean 'gpt2-xl'?"),
        ([str(broken)], "broken.json: expected the JSON of a transformers config, got JSONDecodeError"),
        ([str(Path(__file__).parent)], "expected a folder with a transformers config.json in it"),
    ]:
        assert cli.main(["plan", *arguments]) == 2
        assert words in capsys.readouterr().err


class Adapted(nn.Module):
    """A frozen base beside a small trained part."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.base = nn.Parameter(torch.zeros(1000, dtype=dtype), requires_grad=False)
        self.part = nn.Linear(8, 8)
        self.other = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.part(x).sum() + self.base.sum()


def trained(model):
    return torch.optim.AdamW([*model.part.parameters(), model.other])


def test_a_frozen_base_outside_of_the_optimizer_is_counted_once():
    def body(comm):
        model = Adapted()
        return zerolite.ZeroOptimizer(trained(model), model, stage=3, process_group=comm).plan

    model, built = Adapted(), on_threads(2, body)[0]
    planned = zerolite.plan(model, world=2, ranks_per_host=1, stage=3, optimizer=trained(model))
    assert planned.at_rest("params") == built.at_rest("params")
    for plan in (planned, built):
        assert not any(term.name == "buffers, frozen" for term in plan.terms)


def test_auto_leaves_out_stage_3_where_it_would_be_refused():
    for model, params in [
        (Adapted(torch.int8), lambda m: [*m.part.parameters(), m.other]),  # a frozen dtype that is not sharded
        (Adapted(), lambda m: list(m.part.parameters())),  # one that is trained elsewhere
    ]:
        optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW(params(model)), model, stage="auto", process_group=LocalComm())
        assert optimizer.plan.stage < 3 and not any("stage 3" in note for note in optimizer.plan.notes)
    with pytest.raises(TypeError, match=r"parameter 'base': expected float32, bfloat16 or float16, got torch.int8"):
        zerolite.plan(Adapted(torch.int8), stage=3)
    with pytest.raises(ValueError, match=r"expects float32 parameters \(or its own dtype\), got torch.float16"):
        zerolite.plan(nn.Linear(2, 2, dtype=torch.float16), stage=2, param_dtype=torch.bfloat16)


def test_a_model_on_the_meta_device_is_planned_where_it_will_be_built(monkeypatch):
    model = seeded(Net).to("meta")
    assert partition.device_of(model.parameters()).type == "cpu"
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda", 0))
    assert partition.device_of(model.parameters()) == torch.device("cuda", 0)
    assert partition.device_of(seeded(Net).parameters()).type == "cpu"


def test_an_update_that_the_wrapper_refuses_is_refused_by_the_plan():
    model = nn.Linear(4, 4)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for call in (zerolite.plan, lambda model, **options: zerolite.ZeroOptimizer(options.pop("optimizer"), model, **options)):
        with pytest.raises(ValueError, match=r"update='stream': expected torch.optim.Adam or AdamW without amsgrad, got SGD"):
            call(model, optimizer=sgd, stage=2, offload="states", update="stream")


def test_optimizers_whose_step_runs_on_the_host_are_planned_without_chunks():
    model = nn.Linear(64, 64)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plans = [
        zerolite.plan(model, stage=2, offload="states", device="cuda", optimizer=optimizer)
        for optimizer in (sgd, torch.optim.AdamW(model.parameters()))
    ]
    assert ["chunks of states" in {term.name for term in plan.terms} for plan in plans] == [False, True]


def test_the_modelled_update_counts_elements_of_buckets_of_several_dtypes(monkeypatch):
    def elements(*dtypes):
        model = nn.Module()
        for number, dtype in enumerate(dtypes):
            model.register_parameter(f"p{number}", nn.Parameter(torch.zeros(1 << 16, dtype=dtype, device="meta")))
        plan = zerolite.plan(model, stage=0)
        return cost.seconds(plan, "fp32", rates.Rates(fp32=1.0, bf16=1.0, int8=1.0, average=1e9, link=1e9)) * 1e9

    assert elements(torch.float32, torch.bfloat16) == pytest.approx(2 << 16) == elements(torch.bfloat16, torch.float32)


def test_the_command_line_plans_the_dtype_that_it_was_given(tmp_path, capsys):
    pytest.importorskip("transformers")
    found = []
    for dtype in ("float32", "bfloat16"):  # what a config says of its own checkpoint
        values = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 100, "dtype": dtype}
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert cli.main(["plan", "--config", str(tmp_path), "--dtype", "fp32", "--batch", "2x8", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["plans"])
    assert found[0] == found[1]


def test_the_line_to_add_names_gradients_that_were_asked_for(capsys):
    options = ["plan", "--params", "2e9", "--device-mem", "8G", "--host-mem", "512G", "--gradients", "host"]
    assert cli.main(options) == 0
    assert "offload='states', gradients='host'," in capsys.readouterr().out


def test_a_choice_that_fails_on_rank_0_is_told_to_ranks_with_other_options(monkeypatch):
    def failing(*_):
        raise KeyError("no rates")

    def body(comm):
        model = nn.Linear(4, 4)
        stage = "auto" if comm.rank == 0 else 2
        with pytest.raises(ValueError, match=["stage='auto': 'no rates'", "on rank 0: 'no rates'"][comm.rank]):
            zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage=stage, process_group=comm)
        return True

    monkeypatch.setattr(auto, "_decide", failing)
    assert on_threads(2, body, timeout=10.0) == [True, True]
