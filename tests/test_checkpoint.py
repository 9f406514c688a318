"""State dicts: round trips, torch.optim in and out, other stages and worlds, refusals."""

from __future__ import annotations

import io

import pytest
import torch
from models import Net, Run, equal, loss_of, make, seeded, tokens_for
from ranks import on_threads
from torch import nn

import zerolite
from zerolite.comm.local import LocalComm

stages = pytest.mark.parametrize("stage", [0, 1, 2, 3])
dtypes = pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])


def steps(model, optimizer, rank, first, last):
    losses = []
    for step in range(first, last):
        loss = loss_of(model, tokens_for(step, 0, rank))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def through_disk(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@stages
@dtypes
@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RAdam])
def test_resume_is_bit_exact_at_the_same_world(stage, dtype, optimizer_class):
    run = Run(stage=stage, dtype=dtype, lr=1e-3, optimizer=optimizer_class)

    def body(comm):
        model, optimizer = make(run, comm)
        steps(model, optimizer, comm.rank, 0, 3)
        saved = through_disk({"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()})
        losses = steps(model, optimizer, comm.rank, 3, 6)
        again, resumed = make(run, comm, seeded(Net, seed=9))
        again.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
        assert steps(again, resumed, comm.rank, 3, 6) == losses
        return equal(dict(model.state_dict()), dict(again.state_dict())) and equal(optimizer.full_state(), resumed.full_state())

    assert on_threads(3, body) == [True] * 3


@dtypes
@pytest.mark.parametrize("first,second", [((1, 3), (4, 1)), ((4, 1), (2, 3)), ((2, 3), (3, 2)), ((3, 0), (1, 2))])
def test_consolidated_state_loads_at_another_world_and_stage(dtype, first, second):
    def save(comm, stage):
        model, optimizer = make(Run(stage=stage, dtype=dtype), comm)
        steps(model, optimizer, comm.rank, 0, 3)
        optimizer.consolidate_state_dict(to=comm.size - 1)
        state = optimizer.state_dict()
        assert ("zerolite" in state) == (comm.rank != comm.size - 1)
        return {"model": dict(model.state_dict()), "optimizer": state, "states": optimizer.full_state()}

    def load(comm, stage, saved):
        model, optimizer = make(Run(stage=stage, dtype=dtype, bucket_mb=1e-3), comm, seeded(Net, seed=3))
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return dict(model.state_dict()), optimizer.full_state()

    saved = on_threads(first[0], save, first[1])[-1]
    for params, states in on_threads(second[0], load, second[1], through_disk(saved)):
        assert equal(params, saved["model"]) and equal(states, saved["states"])


def test_into_torch_adamw_and_back():
    model, optimizer = make(Run(stage=3, lr=1e-3), LocalComm())
    steps(model, optimizer, 0, 0, 3)
    optimizer.consolidate_state_dict()
    plain_model = seeded(Net)
    plain_model.load_state_dict(model.state_dict())
    plain = torch.optim.AdamW(plain_model.parameters(), lr=7.0)
    plain.load_state_dict(through_disk(optimizer.state_dict()))
    assert plain.param_groups[0]["lr"] == 1e-3
    expected = steps(plain_model, plain, 0, 3, 6)
    ours = steps(model, optimizer, 0, 3, 6)
    assert ours == pytest.approx(expected, abs=1e-5)
    back_model, back = make(Run(stage=2, lr=1.0), LocalComm(), seeded(Net, seed=5))
    back_model.load_state_dict(plain_model.state_dict())
    back.load_state_dict(plain.state_dict())
    assert back.param_groups[0]["lr"] == 1e-3
    assert steps(back_model, back, 0, 6, 9) == pytest.approx(steps(plain_model, plain, 0, 6, 9), abs=1e-5)


def test_state_dict_is_no_collective_and_a_whole_one_ends_with_the_next_step():
    def body(comm):
        model, optimizer = make(Run(stage=2), comm)
        assert optimizer.state_dict()["state"] == {}  # before the first step
        steps(model, optimizer, comm.rank, 0, 1)
        if comm.rank == 0:
            assert len(optimizer.state_dict()["state"]) > 0  # on one rank only: would hang if it communicated
        optimizer.consolidate_state_dict()
        whole = "zerolite" not in optimizer.state_dict()
        steps(model, optimizer, comm.rank, 1, 2)
        return whole, "zerolite" in optimizer.state_dict()

    assert on_threads(2, body) == [(True, True), (False, True)]


def test_an_empty_state_round_trips():
    _, optimizer = make(Run(stage=2), LocalComm())
    _, other = make(Run(stage=2), LocalComm())
    other.load_state_dict(through_disk(optimizer.state_dict()))
    assert other.state_dict()["state"] == {}


def test_refusals_name_what_differs_and_write_nothing():
    model, optimizer = make(Run(stage=2), LocalComm())
    steps(model, optimizer, 0, 0, 2)
    part, before = optimizer.state_dict(), optimizer.full_state()
    wrong_rank = {**part, "zerolite": {**part["zerolite"], "ranks": 4}}
    with pytest.raises(ValueError, match=r"expected the part of rank 0 of 1, got rank 0 of 4.*consolidate"):
        optimizer.load_state_dict(wrong_rank)
    with pytest.raises(ValueError, match="Update zerolite"):
        optimizer.load_state_dict({**part, "zerolite": {**part["zerolite"], "format": 99}})
    pieces = {**part["zerolite"]["pieces"], 0: [0, 5]}
    with pytest.raises(ValueError, match="another stage or bucket_mb"):
        optimizer.load_state_dict({**part, "zerolite": {**part["zerolite"], "pieces": pieces}})
    with pytest.raises(ValueError, match=r"expected param groups of \[\d+\] parameters, got \[1\]"):
        optimizer.load_state_dict({**part, "param_groups": [{"params": [0]}]})
    optimizer.consolidate_state_dict()
    whole = optimizer.state_dict()
    bad = {**whole, "state": {**whole["state"], 1: {**whole["state"][1], "exp_avg": torch.zeros(2, 2)}}}
    with pytest.raises(ValueError, match="expected state 'exp_avg' of shape"):
        optimizer.load_state_dict(bad)
    assert equal(before, optimizer.full_state())
    with pytest.raises(ValueError, match="expected a rank from 0 to 0, got 3"):
        optimizer.consolidate_state_dict(to=3)


def test_a_master_of_other_parameters_is_not_adopted():
    model, optimizer = make(Run(stage=2, dtype=torch.bfloat16), LocalComm())
    steps(model, optimizer, 0, 0, 2)
    other, fresh = make(Run(stage=2, dtype=torch.bfloat16), LocalComm(), seeded(Net, seed=4))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.warns(UserWarning, match="Load the model before the optimizer"):
        fresh.load_state_dict(optimizer.state_dict())
    assert equal(before, dict(other.state_dict()))
    assert torch.equal(fresh.full_state()["norm.weight"]["master"], other.state_dict()["norm.weight"].float())


def test_state_dict_hooks_fire():
    model, optimizer = make(Run(stage=1), LocalComm())
    steps(model, optimizer, 0, 0, 1)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, sd: seen.append("post") or {**sd, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, sd: seen.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("load post"))
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert state["mine"] == 1 and seen == ["pre", "post", "load pre", "load post"]


@stages
def test_shape_of_a_torch_optimizer(stage):
    model, optimizer = make(Run(stage=stage), LocalComm())
    steps(model, optimizer, 0, 0, 2)
    assert isinstance(optimizer, torch.optim.Optimizer) and "lr" in optimizer.defaults
    assert optimizer.param_groups[0]["params"][0] is next(iter(model.parameters()))
    state = optimizer.state[model.norm.weight]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"} and state["step"] == 2 and state["exp_avg"].shape == (13,)
    assert f"ZeRO stage {stage}" in repr(optimizer) and "AdamW" in repr(optimizer)


def test_named_parameters_keep_their_names():
    model = nn.Linear(3, 2)
    inner = torch.optim.AdamW(model.named_parameters())
    optimizer = zerolite.ZeroOptimizer(inner, process_group=LocalComm())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert set(optimizer.full_state()) == {"weight", "bias"}
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
