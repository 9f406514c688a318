"""Predictions of one world from others, and the forecast."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rows import CONDITIONS, row

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import calibrate, scale, systems, tables


def test_the_fit_finds_coefficients_and_never_negative_ones():
    assert calibrate.fit([[1, 0], [1, 1], [2, 3]], [2.0, 5.0, 13.0]) == pytest.approx([2.0, 3.0])
    assert calibrate.fit([[1, 1], [1, 2]], [2.0, 1.0])[1] == 0.0


def grown(n, model="gpt2-5M", crowd=1.0):
    """Rows of one world that follow the formulas."""
    alone, memory = (0.2 * n / 2 + 0.1 * max(1, n / 2)) * crowd, {"peak": 100 * n + 40, "rest": 80 * n + 30, "ranks": n}
    overs = {systems.ALONE: 0.0, "zerolite 2": 0.05 * (24 + 2 * n) / 26, "DDP + AdamW(fused)": 0.1 * n}
    overs["FSDP2"] = 0.05 + 0.01 * (n - 1)
    each = [row(name, over * crowd, model=model, **memory) for name, over in overs.items()]
    return [{**r, "step": alone + r["overhead"]} for r in each]


def test_a_world_is_predicted_from_the_others_where_the_formulas_hold():
    rows = [r for n in (1, 2, 4) for r in grown(n)]
    found = [{**r, "conditions": CONDITIONS} for r in calibrate.calibrate(rows)]
    assert len(found) == 12 and {tuple(r["known"]) for r in found} == {(1, 2), (1, 4), (2, 4)}
    told = [r for r in found if 1 in r["known"]]
    assert len(told) == 8 and max(abs(error) for r in told for error in r["errors"].values()) < 1e-6
    assert "24 of 24 predictions lie within 10 %: 8 of 8 of step, 8 of 8 of peak, 8 of 8 of rest." in tables.scale(told)
    alone = next(r for r in found if r["known"] == [2, 4] and r["system"] == systems.ALONE)
    assert alone["predicted"]["step"] == pytest.approx(0.15)  # of 0.2: as if the threads of one rank scaled perfectly
    assert not calibrate.calibrate([r for r in rows if r["ranks"] != 4])


def test_what_ranks_beyond_the_cores_lose_is_learnt_from_the_other_models():
    crowds = {"a": 1.2, "b": 1.2, "c": 1.5}
    rows = [r for model, crowd in crowds.items() for n in (1, 2, 4) for r in grown(n, model, crowd if n > 2 else 1.0)]
    found = {(r["model"], r["system"], r["ranks"]): r for r in calibrate.calibrate(rows)}
    assert found["c", systems.ALONE, 4]["crowd"] == pytest.approx(1.2)  # not its own
    assert found["a", "FSDP2", 4]["crowd"] == pytest.approx(1.35)
    assert found["c", "zerolite 2", 2]["crowd"] == found["c", "FSDP2", 1]["crowd"] == pytest.approx(1.2)
    for r in found.values():
        if r["ranks"] == 4:
            assert r["errors"]["step"] == pytest.approx(r["crowd"] / crowds[r["model"]] - 1)


def test_growth_is_learnt_from_three_other_models():
    scales, growth = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 3.0}, {1: 1.0, 2: 1.7, 4: 2.6}
    rows = [
        {**r, "step": scales[model] * growth[n] * (2.0 if (model, n) == ("d", 4) else 1.0)}
        for model in scales
        for n in growth
        for r in grown(n, model)
    ]
    found = {(r["model"], r["ranks"]): r for r in calibrate.calibrate(rows) if r["system"] == "FSDP2"}
    assert all(r["learnt"] for r in found.values())
    assert all(abs(found[model, n]["errors"]["step"]) < 1e-9 for model in "abc" for n in growth)  # medians: d is no matter
    assert found["d", 4]["errors"]["step"] == pytest.approx(-0.5)
    assert found["d", 1]["errors"]["step"] == pytest.approx(2**0.5 - 1)
    few = calibrate.calibrate([r for r in rows if r["model"] != "c"])
    assert not any(r["learnt"] for r in few)


def test_memory_is_predicted_by_the_plan():
    shape = {"kind": "small", "layers": 1, "width": 6400, "heads": 1, "words": 256}
    for moments in ("fp32", "int8"):
        one = row("zerolite 2", shape=shape, settings={"stage": 2, "chosen": "stage 2", "moments": moments})
        plans = {n: calibrate.question(json.dumps(shape), n).plan(2, None, moments) for n in (1, 2, 4)}
        assert calibrate.planned(one, 2, "peak") == plans[2].used("device", host=True) + plans[2].used("host", host=True)
        rest = {n: sum(t.host for t in plans[n].terms if t.when == "always") for n in plans}
        assert calibrate.planned(one, 2, "rest") == rest[2]  # gradients lie in shared memory
        gradients = next(t.host for t in plans[1].terms if t.name == "gradients")
        assert calibrate.planned(one, 1, "rest") == rest[1] - gradients > 0
        for chosen, offload in (("stage 2", None), ("stage 2, offload='states'", "states")):  # what stage="auto" took
            auto, told = {"stage": "auto", "chosen": chosen}, {"stage": 2, "offload": offload}
            rows = [{**one, "settings": {"moments": moments, **settings}} for settings in (auto, told)]
            assert calibrate.planned(rows[0], 2, "peak") == calibrate.planned(rows[1], 2, "peak")
        at = {n: {**one, "ranks": n, "base": 1000 * n, "rest": calibrate.planned(one, n, "rest") + 1007 * n} for n in (1, 2, 4)}
        assert calibrate.memory(at, 4, [1, 2], "rest") == pytest.approx(at[4]["rest"])


def test_the_forecast_follows_its_formulas():
    hw = scale.Hardware("h", 1e12, 80e9, 1e12, 1e9, 1e8, 1e9, here=8, mfu=0.5, latency=0.0)
    found = scale.seconds(hw, 1e9, 16, 1000, 2, None)
    assert found["compute"] == pytest.approx(8 * 1e9 * 1000 / 0.5e12)
    assert found["exchange"] == found["publish"] == pytest.approx(2e9 * 8 / 16 / 1e8)  # the network is the slower way
    assert found["update"] == pytest.approx(1e9 / 16 * (24 + 32) / 1e12)
    assert found["serial"] == pytest.approx(sum(found[k] for k in ("compute", "exchange", "publish", "update")))
    assert found["overlapped"] == pytest.approx(max(found["compute"], 2 * found["exchange"]) + found["update"])
    assert scale.seconds(hw, 1e9, 16, 1000, 3, None)["publish"] == pytest.approx(2 * found["publish"])
    assert scale.seconds(hw, 1e9, 8, 1000, 2, None)["exchange"] == pytest.approx(2e9 * 7 / 8 / 1e9)  # within a host
    (ahead,) = scale.forecast(scale.HARDWARE["H100"], 4096, ["llama-2-7b"], [64])
    assert ahead["fits"] and ahead["stage"] == 1 and 2 * ahead["numel"] < ahead["device"] < 80e9


def test_growth_is_not_learnt_from_another_processor():
    def rows(model, cpu):
        return [{**r, "model": model, "conditions": {**CONDITIONS, "cpu": cpu}} for n in (1, 2, 4) for r in grown(n)]

    others = [r for k in range(3) for r in rows(f"other {k}", "another")]
    found = [r for r in calibrate.calibrate(rows("gpt2-5M", "one") + others) if r["model"] == "gpt2-5M"]
    assert found and not any(r["learnt"] for r in found)
    same = [r for k in range(3) for r in rows(f"other {k}", "one")]
    assert all(r["learnt"] for r in calibrate.calibrate(rows("gpt2-5M", "one") + same))


def test_rows_of_two_processors_are_not_mixed():
    other = {**CONDITIONS, "cpu": "another"}
    rows = [{**r, "conditions": other if n == 4 else CONDITIONS} for n in (1, 2, 4) for r in grown(n)]
    assert not calibrate.calibrate(rows)
    slow = [{**r, "conditions": other, "step": r["step"] * 3} for n in (1, 2, 4) for r in grown(n)]
    both = calibrate.calibrate([r for n in (1, 2, 4) for r in grown(n)] + slow)
    steps = {cpu: [r["measured"]["step"] for r in both if r["cpu"] == cpu] for cpu in ("a <b>", "another")}
    assert len(steps["another"]) == 12 and steps["another"] == pytest.approx([3 * step for step in steps["a <b>"]])
