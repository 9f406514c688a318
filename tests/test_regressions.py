"""Defects that a review found, each with the smallest loop that showed it."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import warnings

import numpy as np
import pytest
import torch
from models import Net, Run, equal, loss_of, make, seeded, tokens_for
from ranks import on_processes, on_threads
from torch import nn
from torch.nn.utils import prune
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map

import zerolite
from zerolite import cli
from zerolite.comm.local import LocalComm
from zerolite.values import copy_the_rest

stages = pytest.mark.parametrize("stage", [0, 1, 2, 3])


def sgd(model, stage, comm=None, lr=1.0, **options):
    inner = torch.optim.SGD(model.parameters(), lr=lr)
    return zerolite.ZeroOptimizer(inner, model, stage=stage, process_group=comm or LocalComm(), **options)


class Branch(nn.Module):
    """`b` is used on demand."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 64, bias=False)

    def forward(self, x, use_b):
        y = self.a(x)
        return y.sum() + self.b(y).sum() * 5 if use_b else y.sum()


@stages
@pytest.mark.parametrize("scaler", [False, True])
def test_clipping_where_only_one_rank_has_a_gradient(stage, scaler):
    def body(comm):
        model = seeded(Branch)
        optimizer = sgd(model, stage, comm)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        scale = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaler)
        scale.scale(model(torch.ones(2, 4), comm.rank == 0)).backward()
        scale.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        scale.step(optimizer)
        return norm, torch.cat([(value - before[name]).flatten() for name, value in model.state_dict().items()])

    (norm, moved), (other, also) = on_threads(2, body)
    plain = seeded(Branch)
    ((plain(torch.ones(2, 4), True) + plain(torch.ones(2, 4), False)) / 2).backward()
    expected = nn.utils.clip_grad_norm_(plain.parameters(), 1.0).item()
    assert norm == other == pytest.approx(expected, rel=1e-5) and torch.equal(moved, also)
    torch.testing.assert_close(moved, torch.cat([-p.grad.flatten() for p in plain.parameters()]), rtol=1e-4, atol=1e-6)


@stages
def test_an_unfrozen_parameter_is_clipped_with_the_others(stage):
    def body(comm):
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)))
        model[0].requires_grad_(False)
        model[1].requires_grad_(False)
        optimizer = sgd(model, stage, comm)
        norms = []
        for unfreeze in (None, 1, 0):
            if unfreeze is not None:
                model[unfreeze].requires_grad_(True)
            model(torch.ones(1, 4) * (comm.rank + 1)).sum().backward()
            assert len(optimizer.full_grads()) == sum(p.requires_grad for p in model.parameters())
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
            optimizer.step()
            optimizer.zero_grad()
        return norms

    first, second = on_threads(2, body)
    assert first == second
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)))
    model.requires_grad_(False)[2].requires_grad_(True)
    plain, norms = torch.optim.SGD(model.parameters(), lr=1.0), []
    for unfreeze in (None, 1, 0):
        if unfreeze is not None:
            model[unfreeze].requires_grad_(True)
        (sum(model(torch.ones(1, 4) * r).sum() for r in (1, 2)) / 2).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
        plain.step()
        plain.zero_grad()
    assert first == pytest.approx(norms, rel=1e-4)


@stages
@pytest.mark.parametrize("value", [None, "zeros"])
def test_a_gradient_replaced_on_one_rank_is_refused_on_all(stage, value):
    def body(comm):
        model = seeded(lambda: nn.Linear(128, 1, bias=False))
        optimizer = sgd(model, stage, comm)
        model(torch.ones(1, 128)).sum().backward()
        if comm.rank == 0:
            model.weight.grad = None if value is None else torch.zeros(1, 128)
        with pytest.raises(ValueError, match="on some ranks only"):
            optimizer.step()
        return True

    assert on_threads(2, body) == [True, True]


def test_a_kept_handle_is_not_the_next_gradient():
    model = seeded(lambda: nn.Linear(8, 1, bias=False))
    optimizer = sgd(model, 2)
    other = seeded(lambda: nn.Linear(8, 1, bias=False))
    foreign = sgd(other, 2)
    x = torch.randn(2, 8)
    model(x).sum().backward()
    saved = model.weight.grad
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) cleared"):
        saved.clone()
    (5 * model(x)).sum().backward()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) cleared"):
        model.weight.grad.add_(saved)
    model.weight.grad = saved
    with pytest.raises(RuntimeError, match=r"of another parameter or of an earlier gradient"):
        optimizer.step()
    optimizer.zero_grad()
    model(x).sum().backward()
    other.weight.grad = model.weight.grad
    with pytest.raises(RuntimeError, match="of another parameter"):
        foreign.step()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("clear", ["model.zero_grad", "None", "after a step"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_kept_handle_is_not_the_next_gradient_however_that_was_cleared(stage, clear, layers):
    """Projections and similarities of gradients keep p.grad of each loss."""
    model = seeded(lambda: nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(layers)]))
    optimizer = sgd(model, stage)
    model(torch.ones(2, 8)).sum().backward()
    kept = [p.grad for p in model.parameters()]
    if clear == "after a step":
        optimizer.step()
    if clear == "None":
        for p in model.parameters():
            p.grad = None
    else:
        model.zero_grad()
    (3 * model(torch.ones(2, 8)).sum()).backward()
    for old, p in zip(kept, model.parameters(), strict=True):
        with pytest.raises(RuntimeError, match=r"earlier gradient|used up"):
            old.clone()
        assert p.grad is not old and bool(p.grad.isfinite().all())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_write_to_a_view_counts_where_another_parameter_is_unused(stage):
    def run(wrap):
        model = seeded(lambda: nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]))
        optimizer = sgd(model, stage) if wrap else torch.optim.SGD(model.parameters(), lr=1.0)
        x = torch.ones(2, 4)
        (model[0](x) + model[1](x)).sum().backward()
        optimizer.step()
        model.zero_grad()
        model[0](x).sum().backward()
        model[0].weight.grad[0, :2] = 0.0
        optimizer.step()
        return {name: value.clone() for name, value in model.state_dict().items()}

    ours, plain = run(True), run(False)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value)


def test_editing_p_grad_inside_of_backward():
    def norm(model, x, backwards):
        for _ in range(backwards):
            model(x).sum().backward()
        return float(model.weight.grad.norm())

    def edit(p):
        p.grad.add_(100.0)

    x = torch.randn(2, 8)
    for before in (True, False):
        model = seeded(lambda: nn.Linear(8, 1, bias=False))
        if before:
            model.weight.register_post_accumulate_grad_hook(edit)
        optimizer = sgd(model, 2)  # kept: hooks refer weakly, and a collected optimizer takes no gradient
        if not before:
            model.weight.register_post_accumulate_grad_hook(edit)
        plain = seeded(lambda: nn.Linear(8, 1, bias=False))
        plain.weight.register_post_accumulate_grad_hook(edit)
        if before:  # the first gradient is a plain tensor there, and the edit is collected with it
            assert norm(model, x, 1) == pytest.approx(norm(plain, x, 1), rel=1e-6)
        with pytest.raises(NotImplementedError, match=r"by a hook"):
            norm(model, x, 1)
        del optimizer


class Counting(torch.optim.Optimizer):
    """Keeps its step count in the param group."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"] / group["k"])


def test_optimizers_that_write_to_their_group_are_refused():
    model = seeded(Net)
    with pytest.raises(NotImplementedError, match=r"writes \['k'\] to the param group"):
        zerolite.ZeroOptimizer(Counting(model.parameters()), model, process_group=LocalComm())


def begin_with_rank_values(rank, stage):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.register_buffer("flag", torch.full((3,), rank == 0))
    model.register_buffer("wide", torch.full((1, 4), float(rank)).expand(3, 4))
    model.register_buffer("turned", torch.full((2, 3), rank, dtype=torch.int16).t())
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(rank + 1.0)
    model[0].requires_grad_(False)
    inner = torch.optim.SGD(model[1].parameters(), lr=1.0)
    zerolite.ZeroOptimizer(inner, model, stage=stage, param_dtype=torch.bfloat16)
    state = model.state_dict()
    assert state["0.weight"].dtype == torch.bfloat16
    return {name: value.float().mean().item() for name, value in state.items()}


@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_parameters_and_odd_buffers_begin_as_on_rank_0(stage):
    for values in on_processes(2, begin_with_rank_values, stage):
        assert all(values[name] == 1.0 for name in values if "." in name)
        assert (values["flag"], values["wide"], values["turned"]) == (1.0, 0.0, 0.0)


@stages
def test_states_of_parameters_that_are_frozen_when_loading(stage):
    def build():
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        model[0].requires_grad_(False)
        return model, zerolite.ZeroOptimizer(
            torch.optim.AdamW(model.parameters(), lr=0.1), model, stage=stage, process_group=LocalComm()
        )

    model, optimizer = build()
    model[0].requires_grad_(True)
    for _ in range(2):
        model(torch.ones(1, 4)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    again, resumed = build()
    again.load_state_dict(model.state_dict())
    optimizer.consolidate_state_dict()
    resumed.load_state_dict(optimizer.state_dict())
    again[0].requires_grad_(True)
    again(torch.ones(1, 4)).pow(2).sum().backward()
    resumed.step()
    assert {int(state["step"]) for state in resumed.full_state().values()} == {3}


def test_low_bits_survive_a_state_without_masters():
    model = seeded(Net)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    inner = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    loss_of(model, tokens_for(0, 0, 0)).backward()
    inner.step()
    inner.zero_grad()
    optimizer = zerolite.ZeroOptimizer(inner, model, param_dtype=torch.bfloat16, process_group=LocalComm())
    loss_of(model, tokens_for(0, 0, 0)).backward()
    optimizer.step()
    for name, state in optimizer.full_state().items():
        assert torch.equal(state["master"], values[name]), name


def test_a_write_before_saving_is_in_the_saved_master():
    model, optimizer = make(Run(stage=1, dtype=torch.bfloat16), LocalComm())
    loss_of(model, tokens_for(0, 0, 0)).backward()
    optimizer.step()
    with torch.no_grad():
        model.norm.weight.fill_(1.0)
    with pytest.warns(UserWarning, match="written outside"):
        assert torch.equal(optimizer.full_state()["norm.weight"]["master"], torch.ones(13))


def test_amsgrad_cannot_come_later():
    model, optimizer = make(Run(stage=1), LocalComm())
    with pytest.raises(NotImplementedError, match="expected amsgrad=False"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "amsgrad": True})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["amsgrad"] = True
    loss_of(model, tokens_for(0, 0, 0)).backward()
    with pytest.raises(NotImplementedError, match="expected amsgrad=False"):
        optimizer.step()


def test_a_parameter_added_to_the_wrapped_optimizer():
    model = seeded(Net)
    inner = torch.optim.AdamW(model.parameters())
    optimizer = zerolite.ZeroOptimizer(inner, model, process_group=LocalComm())
    inner.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(RuntimeError, match="add_param_group of the ZeroOptimizer"):
        optimizer.step()


def test_full_params_stay_whole_through_a_forward_and_keep_every_write():
    model, optimizer = make(Run(stage=3), LocalComm())
    with optimizer.full_params():
        model(tokens_for(0, 0, 0))
        assert all(p.isfinite().all() for p in model.parameters())
        model.norm.weight.data.fill_(2.0)
    assert torch.equal(model.state_dict()["norm.weight"], torch.full((13,), 2.0))


def test_parts_called_without_the_model_at_stage_3():
    for variant in ("two backwards", "an evaluation in between"):
        model, optimizer = make(Run(stage=3), LocalComm())
        plain = seeded(Net)
        x = torch.randn(2, 3, 13, generator=torch.Generator().manual_seed(1))
        for m in (model, plain):
            first, second = m.norm(m.blocks[0].up(x)[..., :13]).sum(), m.blocks[0].up(2 * x).pow(2).sum()
            first.backward()
            if variant == "an evaluation in between":
                with torch.no_grad():
                    m(tokens_for(0, 0, 0))
            second.backward()
        for name, value in optimizer.full_grads().items():
            torch.testing.assert_close(value, dict(plain.named_parameters())[name].grad)


class View(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x))).view(2, 8, 8)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(View() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x += 1
            x = x.reshape(2, 64) * 1.0
        return x


def test_outputs_that_the_caller_changes_in_place_at_stage_3():
    model, plain = seeded(InPlace), seeded(InPlace)
    optimizer = sgd(model, 3)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        optimizer.zero_grad()
        model(x).pow(2).sum().backward()
    plain(x).pow(2).sum().backward()
    for name, value in optimizer.full_grads().items():
        assert torch.equal(value, dict(plain.named_parameters())[name].grad)


@stages
def test_input_gradients_and_a_gradient_penalty(stage):
    def loop(model, step):
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
        (saliency,) = torch.autograd.grad(model(x).sum(), x)
        (inner,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
        (model(x).sum() + inner.pow(2).sum()).backward()
        step()
        return saliency

    def net():
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    model, plain = seeded(net), seeded(net)
    optimizer = sgd(model, stage, lr=0.01)
    ours = loop(model, optimizer.step)
    theirs = loop(plain, torch.optim.SGD(plain.parameters(), lr=0.01).step)
    torch.testing.assert_close(ours, theirs)
    if stage == 3:
        assert not any(unit.buckets[0].whole for unit in optimizer._built.schedule.units)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])


class ChangesItsInput(nn.Module):
    """A frozen weight of its own, and a residual that is added in place."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Parameter(torch.randn(16, 16) / 4, requires_grad=False)
        self.lora, self.out = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)

    def forward(self, x):
        x += self.lora(nn.functional.linear(x, self.frozen))
        return self.out(x).tanh() + 1


def test_a_unit_that_changes_its_input_in_place_at_stage_3():
    """The input's gradient is that of what it was: until then the weights are needed."""

    def run(wrap):
        model = seeded(lambda: nn.Sequential(nn.Linear(16, 16), nn.Sequential(*[ChangesItsInput() for _ in range(3)])))
        optimizer = sgd(model, 3, lr=0.1) if wrap else torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            optimizer.zero_grad()
            model(torch.full((2, 16), 0.1 * step + 0.1)).sum().backward()
            optimizer.step()
        return {name: value.clone() for name, value in model.state_dict().items()}

    ours, plain = run(True), run(False)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, msg=name)


def test_a_unit_that_is_called_root():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.root, self.head = View(), nn.Linear(8, 8)

        def forward(self, x):
            return self.head(self.root(x))

    model = seeded(Named)
    sgd(model, 3, units=[View])
    assert torch.equal(model(torch.ones(2, 64)), seeded(Named)(torch.ones(2, 64)))


@stages
def test_a_clip_before_a_backward_costs_one_exchange_a_bucket(stage):
    model, optimizer = make(Run(stage=stage, bucket_mb=1e-6), LocalComm())
    buckets = len(optimizer._trained)
    loss_of(model, tokens_for(0, 0, 0)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    before = optimizer._parts.comm.ledger.calls["exchange"]
    loss_of(model, tokens_for(0, 1, 0)).backward()
    optimizer.step()
    assert optimizer._parts.comm.ledger.calls["exchange"] - before == buckets


def test_failed_forwards_keep_no_activation_at_stage_3():
    model, optimizer = make(Run(stage=3), LocalComm())
    handle = model.blocks[1].up.register_forward_hook(lambda *_: 1 / 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            loss_of(model, tokens_for(0, 0, 0))
    handle.remove()
    loss_of(model, tokens_for(0, 0, 0)).backward()
    optimizer.step()
    assert all(unit.calls == [] for unit in optimizer._built.schedule.units)


def test_a_backward_through_a_parameter_that_the_step_left_alone():
    model = seeded(lambda: nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    optimizer = sgd(model, 1)
    late = model[0](torch.ones(1, 4, requires_grad=True)).sum()
    model[1](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    late.backward()
    assert model[0].weight.grad is not None


def test_global_step_hooks_fire_once_a_step():
    seen = []
    handle = register_optimizer_step_pre_hook(lambda o, *_: seen.append(type(o).__name__))
    model = seeded(Net)
    optimizer = sgd(model, 1, bucket_mb=1e-6)
    loss_of(model, tokens_for(0, 0, 0)).backward()
    seen.clear()
    optimizer.step()
    handle.remove()
    assert seen == ["ZeroOptimizer"]


def one_rank_under_no_sync(rank):
    model, optimizer = make(Run(stage=2, dtype=torch.bfloat16), None)
    if rank == 0:
        with optimizer.no_sync():
            loss_of(model, tokens_for(0, 0, rank)).backward()
    try:
        loss_of(model, tokens_for(0, 1, rank)).backward()
        optimizer.step()
    except (zerolite.RankError, ValueError) as error:
        return str(error)


def test_no_sync_on_one_rank_only_is_named():
    assert all(
        "no_sync() on every rank" in message or "disagree" in message for message in on_processes(2, one_rank_under_no_sync)
    )


def test_setting_up_looks_at_each_name_once():
    """A dictionary of all names for each parameter took 4 seconds with 10,000 parameters and 17 with 20,000."""
    seen = [0]

    class Name(str):
        def __hash__(self):
            seen[0] += 1
            return super().__hash__()

    class Model(nn.Module):
        def named_parameters(self, *args, **options):
            return [(Name(name), p) for name, p in super().named_parameters(*args, **options)]

    count, model = 50, Model()
    for k in range(count):
        model.register_parameter(f"w{k}", nn.Parameter(torch.ones(2), requires_grad=False))
    copy_the_rest([], torch.bfloat16, model, LocalComm())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and seen[0] <= count
    seen[0] = 0
    model.requires_grad_(True)
    sgd(model, 2)
    assert seen[0] < 20 * count


# ---- checkpoints


@stages
def test_whole_states_of_parameters_in_another_order_of_memory(stage):
    """channels_last and transposed parameters, which show other strides while they are released."""

    def model_of():
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4)).to(memory_format=torch.channels_last)
        model[2].weight = nn.Parameter(model[2].weight.detach().t().contiguous().t())
        return model

    def train(model, optimizer):
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(2, 3, 3, 3, generator=generator)).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    plain_model = seeded(model_of)
    plain = torch.optim.AdamW(plain_model.parameters())
    train(plain_model, plain)
    model = seeded(model_of)
    optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage=stage, process_group=LocalComm())
    train(model, optimizer)
    optimizer.consolidate_state_dict()
    saved = optimizer.state_dict()["state"]
    for index, state in plain.state_dict()["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(saved[index][name], state[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_meta_model_with_parameters_in_another_order_of_memory(stage):
    class Diagonal(nn.Conv2d):
        def reset_parameters(self):
            nn.init.dirac_(self.weight)
            nn.init.zeros_(self.bias)

    with zerolite.meta_init():
        model = nn.Sequential(Diagonal(3, 8, 3)).to(memory_format=torch.channels_last)
    optimizer = sgd(model, stage)
    with optimizer.full_params():
        assert torch.equal(model[0].weight, nn.init.dirac_(torch.empty(8, 3, 3, 3)))


def test_deep_copies_inside_meta_init_keep_how_they_begin():
    def fill(module):
        with torch.no_grad():
            for p in module._parameters.values():
                if p is not None:
                    p.fill_(3.0)

    with zerolite.meta_init(init=fill):
        layer = nn.TransformerEncoderLayer(8, 2, 16)
        model = nn.TransformerEncoder(layer, 3)
    sgd(model, 2)
    assert all(bool((p == 3.0).all()) for p in model.parameters())
    with zerolite.meta_init(init=False):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3)
    sgd(model, 2)
    assert all(bool(p.isnan().all()) for p in model.parameters())


def test_meta_parameters_that_move_to_another_module_keep_how_they_begin():
    class Bare(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return x @ self.weight

    with zerolite.meta_init(init=False):
        source = nn.Linear(4, 4, bias=False)
    moved = Bare(source.weight)  # knows no recipe, and needs none
    sgd(moved, 2)
    assert bool(moved.weight.isnan().all())
    with zerolite.meta_init():
        source = nn.Linear(4, 4, bias=False)
    with pytest.raises(ValueError, match=r"parameter 'weight': expected a way to initialise it .* got none in Bare"):
        sgd(Bare(source.weight), 2)


@pytest.mark.parametrize("whole", [False, True])
def test_a_state_that_was_made_when_the_optimizer_was_built_is_saved(whole):
    def build():
        model = seeded(Branch)
        inner = torch.optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.5)
        return model, zerolite.ZeroOptimizer(inner, model, process_group=LocalComm())

    def step(model, optimizer, use_b):
        model(torch.ones(2, 4), use_b).backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = build()
    step(model, optimizer, False)  # `b` has a state and no step yet
    if whole:
        optimizer.consolidate_state_dict()
    saved = optimizer.state_dict()
    other, again = build()
    other.load_state_dict(model.state_dict())
    again.load_state_dict(saved)
    for pair in ((model, optimizer), (other, again)):
        step(*pair, True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    if whole:
        plain = torch.optim.Adagrad(model.parameters(), lr=0.1)
        plain.load_state_dict(saved)
        assert all("sum" in plain.state[p] for p in model.parameters())


# ---- param groups


@stages
def test_parameters_that_leave_or_change_their_group(stage):
    def run(optimize):
        model = seeded(Branch)
        groups = [{"params": [model.a.weight]}, {"params": [model.b.weight], "lr": 0.1}]
        optimizer = optimize(torch.optim.AdamW(groups, lr=0.01), model)
        for step in range(5):
            model(torch.ones(2, 4), True).backward()
            if step == 1:  # b's rate for a
                optimizer.param_groups[0]["params"].pop()
                optimizer.param_groups[1]["params"].append(model.a.weight)
            if step == 2:  # a is not updated any more
                optimizer.param_groups[1]["params"].pop()
            if step == 4:  # and comes back
                optimizer.param_groups[0]["params"].append(model.a.weight)
            optimizer.step()
            model.zero_grad()
        return {name: value.clone() for name, value in model.state_dict().items()}

    ours = run(lambda inner, model: zerolite.ZeroOptimizer(inner, model, stage=stage, process_group=LocalComm()))
    plain = run(lambda inner, model: inner)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


def test_a_group_that_is_refused_leaves_nothing_behind():
    model, optimizer = make(Run(stage=2), LocalComm())
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        optimizer.add_param_group({"params": [good, bad]})
    (good.sum() + loss_of(model, tokens_for(0, 0, 0))).backward()
    optimizer.step()
    assert torch.equal(good, torch.ones(3)) and len(optimizer.param_groups) == 1


# ---- full_params, copies


@pytest.mark.parametrize("stage", [2, 3])
def test_full_params_may_be_nested_and_refuse_a_step(stage):
    model, optimizer = make(Run(stage=stage, dtype=torch.bfloat16), LocalComm())
    with optimizer.full_params():
        with optimizer.full_params():
            pass
        assert not any(bool(p.isnan().any()) for p in model.parameters())
        with torch.enable_grad():
            loss_of(model, tokens_for(0, 0, 0)).backward()
        before = optimizer.full_state()
        with pytest.raises(RuntimeError, match=r"expected outside of `with optimizer\.full_params"):
            optimizer.step()
    optimizer.step()
    assert before == {} and optimizer.full_state()


def averaged(rank, stage):
    """The guide's weight average."""
    model = seeded(Net)
    ema = copy.deepcopy(model)
    model, optimizer = make(Run(stage=stage, dtype=torch.bfloat16), None, model)
    begun = [p.detach().clone() for p in ema.parameters()]
    for step in range(2):
        loss_of(model, tokens_for(step, 0, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
        with optimizer.full_params():
            for e, p in zip(ema.parameters(), model.parameters(), strict=True):
                e.lerp_(p.to(e.dtype), 0.001)
    assert not any(torch.equal(a, b) for a, b in zip(begun, ema.parameters(), strict=True))
    return [p.detach().clone() for p in ema.parameters()], optimizer.full_state()


@pytest.mark.parametrize("stage", [2, 3])
def test_a_weight_average_is_the_same_at_every_stage(stage):
    first = on_processes(2, averaged, 0)
    found = on_processes(2, averaged, stage)
    assert equal(first, found) and equal(found[0], found[1])


def copied(rank):
    model, optimizer = make(Run(stage=3), None)
    with optimizer.full_params():
        twin = copy.deepcopy(model)
    if rank == 0:  # a model by itself, not a collective
        with torch.no_grad():
            twin(tokens_for(5, 0, 0))
        loss_of(twin, tokens_for(5, 0, 0)).backward()
    loss_of(model, tokens_for(0, 0, rank)).backward()
    optimizer.step()
    return all(p.grad is None or type(p.grad) is torch.Tensor for p in twin.parameters())


@pytest.mark.parametrize("env", [{}, {"ZEROLITE_SHARED": "0"}], ids=["shared", "gloo"])
def test_a_deep_copy_of_the_model_is_a_model_by_itself(env):
    assert on_processes(2, copied, env=env, timeout=15) == [True, True]


def test_a_handle_that_is_used_up_cannot_be_copied():
    model, optimizer = make(Run(stage=2), LocalComm())
    loss_of(model, tokens_for(0, 0, 0)).backward()
    handle = model.norm.weight.grad
    assert torch.equal(copy.deepcopy(handle), handle.clone())
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"that optimizer\.step\(\) used up"):
        copy.deepcopy(handle)


def test_a_norm_after_a_backward_that_brought_nothing_is_the_clipped_one():
    model, _ = make(Run(stage=3), LocalComm())
    loss_of(model, tokens_for(0, 0, 0)).backward()
    total = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    weights = torch.ones(2, 7, 31, requires_grad=True)
    torch.autograd.grad((model(tokens_for(1, 0, 0)) * weights).sum(), weights)
    assert total > 0.1 and nn.utils.clip_grad_norm_(model.parameters(), 1.0).item() == pytest.approx(0.1, rel=1e-3)


class Clipped(torch.optim.SGD):
    """Its step looks at all gradients."""

    def step(self, closure=None):
        torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.1)
        return super().step(closure)


class Lars(torch.optim.SGD):
    """Its step looks at a parameter's norm, in some groups."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"] if group.get("adapt", True) else []:
                p.grad.mul_(p.detach().norm() / (p.grad.norm() + 1e-6))
        return super().step(closure)


def warmed_up(model):
    inner = torch.optim.Adafactor(model.parameters(), lr=1e-2)
    torch.optim.lr_scheduler.LambdaLR(inner, lambda step: min(1, step / 4))  # the rate is 0 now
    return inner


def two_groups(model):
    first, *rest = model.parameters()
    return Lars([{"params": [first], "adapt": False}, {"params": rest}], lr=0.1)


@pytest.mark.parametrize("make", [warmed_up, two_groups, lambda model: Clipped(model.parameters(), lr=0.1)])
def test_what_is_not_elementwise_is_refused_whatever_its_rate_group_or_reach(make):
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    with pytest.raises(NotImplementedError, match="Use an elementwise optimizer"):
        zerolite.ZeroOptimizer(make(model), model)


@pytest.mark.parametrize("first", [torch.zeros(()), torch.zeros(0)])
def test_an_optimizer_that_has_stepped_on_a_scalar_first(first):
    params = [nn.Parameter(first), nn.Parameter(torch.ones(8, 4))]
    inner = torch.optim.NAdam(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    inner.step()
    optimizer = zerolite.ZeroOptimizer(inner)
    (params[0].sum() + params[1].sum()).backward()
    optimizer.step()
    assert bool((params[1] < 0.9).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counts_of_steps_are_saved_in_fp32_under_any_default_dtype(dtype):
    model = nn.Linear(8, 8).to(dtype)
    torch.set_default_dtype(dtype)
    try:
        optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
        for entry in optimizer._parts.entries:
            entry.steps = 70_001
        optimizer.consolidate_state_dict()
        saved = optimizer.state_dict()["state"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(float(state["step"]) == 70_001 for state in saved.values())


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ParameterDict({"w": nn.Parameter(torch.randn(8, 8) * 0.3)}) for _ in range(2)])
        self.nested = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8), nn.ParameterList([torch.randn(8)])]) for _ in range(2)])
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(x @ layer["w"])
        for linear, shift in self.nested:
            x = torch.tanh(linear(x) + shift[0])
        return self.head(x)


def test_lists_of_parameters_are_no_units_of_their_own():
    def run(stage):
        model = seeded(Lists)
        optimizer = sgd(model, stage, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
        assert optimizer.skipped_steps == 0
        return {name: value.clone() for name, value in model.state_dict().items()}

    sharded = run(3)
    for name, value in run(2).items():
        assert torch.equal(sharded[name], value), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_pruning_an_optimizer_s_model(stage):
    """The parameter is the same one, under another name."""

    def run(wrap):
        model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)))
        optimizer = sgd(model, stage, lr=0.1) if wrap else torch.optim.SGD(model.parameters(), lr=0.1)
        with optimizer.full_params() if wrap and stage == 3 else contextlib.nullcontext():
            prune.random_unstructured(model[0], "weight", 0.5)
            with torch.no_grad():
                model[0].weight_mask.copy_(torch.arange(64).view(8, 8) % 2)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(2, 8)).sum().backward()
            optimizer.step()
        return {name: value.clone() for name, value in model.state_dict().items()}

    ours, plain = run(True), run(False)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, msg=name)


def test_writing_to_the_dicts_of_states_says_that_it_does_nothing(tmp_path):
    model = seeded(lambda: nn.Linear(4, 1))
    optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), model)
    assert optimizer.state[model.weight] == {}
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    state = optimizer.state
    assert set(state[model.weight]) == {"step", "exp_avg", "exp_avg_sq"} and copy.deepcopy(state).keys()
    for write in (
        lambda: setattr(optimizer, "state", collections.defaultdict(dict)),
        state.clear,
        lambda: state.__setitem__(model.weight, {}),
        lambda: state[model.weight].__setitem__("exp_avg", torch.zeros(4)),
        lambda: state.pop(model.weight),
    ):
        with pytest.raises(RuntimeError, match=r"load_state_dict\(\.\.\.\), to begin anew one with 'state': \{\}"):
            write()
    for values in state.values():
        for name, value in values.items():
            values[name] = value.to("cpu") if isinstance(value, torch.Tensor) else value
    state[model.weight] = {name: value.clone() for name, value in state[model.weight].items()}
    assert tree_map(torch.clone, state[model.weight]).keys() == state[model.weight].keys()
    torch.save(dict(state[model.weight]) | {"all": list(state.values())}, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt")
    assert torch.equal(loaded["all"][0]["exp_avg"], state[model.weight]["exp_avg"])
    optimizer.load_state_dict({"state": {}, "param_groups": optimizer.state_dict()["param_groups"]})
    assert optimizer.state[model.weight] == {} and all(not bool(m.any()) for m in optimizer._trained[0].state.tensors())


def given(model, optimizer, how):
    """Loops whose added gradients somebody else has too."""
    x, g = torch.full((8, 8), 2.0), torch.ones(8, 8)
    if how == "shared":
        ((model.a + model.b) * x).sum().backward()
        optimizer.zero_grad(set_to_none=False)
        ((model.a + model.b) * x).sum().backward()
        model.a.grad = None
    elif how == "clipped between":
        ((model.a + model.b) * x).sum().backward()
        optimizer.zero_grad(set_to_none=False)
        ((model.a + model.b) * x).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        ((model.a + model.b) * x).sum().backward()
    else:
        for k in (1.0, 2.0):
            (model.a.t() + 0.0 if how == "view" else model.a + 0.0).backward(g.fill_(k))
        g.fill_(100.0)
    optimizer.step()


@stages
@pytest.mark.parametrize("how", ["shared", "clipped between", "buffer", "view"])
@pytest.mark.parametrize("bucket_mb", [1e-6, 25])
def test_added_gradients_that_others_have_too(stage, how, bucket_mb):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.zeros(8, 8)) for _ in range(3))

    ours, plain = Two(), Two()
    optimizer = sgd(ours, stage, bucket_mb=bucket_mb)
    given(ours, optimizer, how)
    given(plain, torch.optim.SGD(plain.parameters(), lr=1.0), how)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], msg=name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_second_optimizer_for_the_same_parameters_asks_for_the_first_to_go(stage):
    model = seeded(lambda: nn.Linear(4, 4))
    first = sgd(model, stage)
    with pytest.raises(ValueError, match=r"'weight'.*another trains already\. Call its remove_hooks\(\) first"):
        sgd(model, stage)
    first.remove_hooks()
    second = sgd(model, stage)
    model(torch.ones(2, 4)).sum().backward()
    second.step()
    assert second.skipped_steps == 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("change", [nn.Module.bfloat16, nn.Module.double])
def test_another_dtype_after_wrapping_is_named(stage, change):
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)))
    optimizer = sgd(model, stage)
    with pytest.raises(RuntimeError, match=r"its storage was replaced \(p\.data = \.\.\., model\.to\(\.\.\.\)"):
        change(model)
        model(torch.ones(2, 4, dtype=next(model.parameters()).dtype)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stage": 3, "units": nn.Linear}, r"units: expected a list of nn\.Module classes such as \[TransformerBlock\], got"),
        ({"stage": 3, "units": []}, r"units: expected a list of nn\.Module classes"),
        ({"bucket_mb": "25"}, "bucket_mb: expected more than 0, and finite, got '25'"),
        ({"bucket_mb": None}, "bucket_mb: expected more than 0, and finite, got None"),
        ({"moments": ["int8"]}, r"moments: expected one of 'fp32', 'bf16', 'int8', got \['int8'\]"),
    ],
)
def test_options_of_another_type_are_named(options, message):
    model = nn.Linear(4, 4)
    with pytest.raises((TypeError, ValueError), match=message):
        zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, **options)


def test_a_plan_of_a_count_asks_for_no_batch(capsys):
    assert cli.main(["plan", "--params", "7B", "--batch", "4x1024"]) == 2
    assert "--batch: expected a name or --config, whose model can run, got --params" in capsys.readouterr().err
    cli.main(["plan", "--params", "1M"])
    assert "Activations are not counted.\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "make",
    [
        lambda w, b: torch.optim.Adam([{"params": [w]}, {"params": [b], "amsgrad": True}]),
        lambda w, b: torch.optim.RMSprop([{"params": [w]}, {"params": [b], "centered": True, "momentum": 0.9}]),
    ],
)
def test_groups_with_other_states_than_the_first(make):
    model = nn.Linear(8, 8)
    inner = make(model.weight, model.bias)
    model(torch.ones(2, 8)).sum().backward()
    inner.step()
    inner.zero_grad()
    optimizer = zerolite.ZeroOptimizer(inner, model)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert optimizer.skipped_steps == 0


def test_an_optimizer_that_is_gone_is_in_nobodys_way():
    model = seeded(lambda: nn.Linear(4, 4))
    for _ in range(2):  # as a phase of a training that builds its own
        optimizer = sgd(model, 2)
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        assert optimizer.skipped_steps == 0
        optimizer.zero_grad()
        del optimizer


@stages
def test_a_handle_that_was_kept_beside_a_step_without_gradients(stage):
    model = seeded(lambda: nn.Linear(8, 8, bias=False))
    optimizer = sgd(model, stage)
    model(torch.ones(2, 8)).sum().backward()
    kept, model.weight.grad = model.weight.grad, None
    optimizer.step()
    (3 * model(torch.ones(2, 8)).sum()).backward()
    with pytest.raises(RuntimeError, match="earlier gradient"):
        kept.clone()


class Chosen(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.forward = self.fast

    def fast(self, x):
        return x @ self.weight


def test_a_forward_of_the_instance_makes_a_unit():
    model = nn.Sequential(Chosen(), Chosen())
    optimizer = sgd(model, 3)
    assert [unit.name for unit in optimizer._parts.schedule.units] == ["0", "1"]
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


class Inner(torch.optim.Optimizer):
    """Steps another optimizer, as wrappers for logging do."""

    def __init__(self, base):
        super().__init__(base.param_groups, base.defaults)
        self.base, self.param_groups = base, base.param_groups

    def step(self, closure=None):
        return self.base.step(closure)


def test_an_optimizer_that_steps_another_one_is_refused():
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    with pytest.raises(NotImplementedError, match=r"Inner: its step leaves the parameters .* steps another optimizer"):
        zerolite.ZeroOptimizer(Inner(torch.optim.SGD(model.parameters(), lr=0.1)), model)
    assert torch.equal(model.weight, before)


def halved(step):
    @functools.wraps(step)
    def wrapper(self, *args, **options):
        for group in self.param_groups:
            group["lr"] *= 0.5
        try:
            return step(self, *args, **options)
        finally:
            for group in self.param_groups:
                group["lr"] *= 2

    return wrapper


class Halved(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @halved
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"])


@pytest.mark.parametrize("kind", [Halved, torch.optim.SGD])
def test_decorators_of_a_step_count_and_global_hooks_run_once(kind):
    ran = []
    hook = register_optimizer_step_post_hook(lambda *_: ran.append(1))
    results = []
    for wrap in (False, True):
        model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
        optimizer = kind(model.parameters(), lr=0.1)
        if wrap:
            optimizer = zerolite.ZeroOptimizer(optimizer, model, bucket_mb=0.0001)
        ran.clear()
        for _ in range(3):
            model(torch.ones(2, 8)).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in model.parameters()])
        assert len(ran) <= 3
    hook.remove()
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.scale, self.out = nn.Embedding(10, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 1)

    def forward(self, tokens):
        return self.out(self.embedding(tokens) * self.scale).pow(2).mean()


def test_a_step_inside_a_backward_raises_at_stage_3():
    model = seeded(Scaled)
    optimizer = zerolite.ZeroOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, stage=3)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: optimizer.step() and None)
    with pytest.raises(RuntimeError, match=r"step\(\): expected to be called after backward\(\), got called inside"):
        model(torch.arange(10)).backward()


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("to_none", [True, False])
def test_cleared_edited_gradients_are_gradients_that_are_not_there(stage, to_none):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.x = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x, expert):
            return self.x[expert](self.a(x)).pow(2).mean()

    def body(comm):
        model = seeded(Experts)
        optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage=stage, process_group=comm)
        model(torch.ones(2, 4), comm.rank).backward()
        nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        optimizer.zero_grad(set_to_none=to_none)  # this step is left out
        for p in model.parameters():
            assert p.grad is None if to_none else not bool(p.grad.any())
        model(torch.ones(2, 4), comm.rank).backward()
        optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    first, second = on_threads(2, body)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_fp16_master_outlives_writes_that_change_nothing(stage):
    def end(limit):
        model = seeded(lambda: nn.Sequential(nn.Embedding(16, 8, max_norm=limit), nn.Linear(8, 16)))
        optimizer = zerolite.ZeroOptimizer(
            torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0), model, stage=stage, param_dtype=torch.float16
        )
        for step in range(20):
            tokens = torch.randint(0, 16, (32,), generator=torch.Generator().manual_seed(step))
            nn.functional.cross_entropy(model(tokens).float(), tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.full_state()["0.weight"]["master"]

    assert torch.equal(end(None), end(1000.0))  # which is never reached


@pytest.mark.parametrize("before_wrapping", [False, True])
def test_pretrained_files_of_a_compiled_model(tmp_path, before_wrapping):
    model = seeded(lambda: nn.Linear(4, 4))
    compiled = torch.compile(model, backend="eager")
    optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), compiled if before_wrapping else model)
    before = model.weight.detach().clone()
    zerolite.save_pretrained(compiled, tmp_path)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.weight.zero_()
    zerolite.load_pretrained(compiled, tmp_path)
    assert torch.equal(model.weight, before) and not optimizer.skipped_steps


@pytest.mark.parametrize("size", [1, 3])
def test_states_that_cannot_be_cut_with_the_parameter_are_refused(size):
    class Vector(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 1e-2})

        @torch.no_grad()
        def step(self, closure=None):
            for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                state = self.state[p]
                state["product"] = state.get("product", torch.ones(size)) * 0.9
                p.sub_(p.grad * 1e-2 / (1 - state["product"][0]))

    model = nn.Linear(4, 4)
    with pytest.raises(NotImplementedError, match=rf"Vector: expected states .* got 'product' of shape \({size},\)"):
        zerolite.ZeroOptimizer(Vector(model.parameters()), model)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_what_is_made_in_inference_mode_is_trained_outside(stage, kind):
    """Building, loading, adding a group: what they allocate is updated by later steps."""
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    model[1].requires_grad_(False)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    with torch.inference_mode():
        inner = kind((model if stage == 3 else model[0]).parameters(), lr=0.1, **options)
        optimizer = zerolite.ZeroOptimizer(inner, model, stage=stage, process_group=LocalComm())

    def step():
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with torch.inference_mode():
        optimizer.load_state_dict(optimizer.state_dict())
        model[1].requires_grad_(True)
        if stage < 3:
            optimizer.add_param_group({"params": model[1].parameters()})
    step()
    step()
    with optimizer.full_params():
        assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert all(entry.steps >= 2 for bucket in optimizer._trained for entry in bucket.entries)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_buffers_that_an_evaluation_made_in_inference_mode(stage):
    model = nn.Linear(4, 4)
    with torch.inference_mode():
        model.register_buffer("cache", torch.ones(3))
    optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage=stage)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert model.cache.tolist() == [1.0] * 3 and model.cache.is_inference()


def test_frozen_parameters_of_other_dtypes_at_stage_3():
    model = nn.Linear(4, 4)
    model.codes = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    trained = [model.weight, model.bias]
    zerolite.ZeroOptimizer(torch.optim.AdamW(trained), model, stage=2).remove_hooks()
    with pytest.raises(TypeError, match=r"parameter 'codes': stage 3 shards every .*got torch\.int8\. Register it as a buffer"):
        zerolite.ZeroOptimizer(torch.optim.AdamW(trained), model, stage=3)


@pytest.mark.parametrize("kind", [dict, list])
def test_states_inside_of_a_container_are_refused(kind):
    class Several(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 1e-2})

        @torch.no_grad()
        def step(self, closure=None):
            for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                zeros = [torch.zeros_like(p), torch.zeros_like(p)]
                kept = self.state[p].setdefault("averages", zeros if kind is list else dict(enumerate(zeros)))
                for k in range(2):
                    p.sub_(kept[k].mul_(0.5 + k / 4).add_(p.grad), alpha=1e-2)

    model = nn.Linear(4, 4)
    with pytest.raises(
        NotImplementedError, match=rf"Several: .* got 'averages', a {kind.__name__} of tensors, which cannot be cut"
    ):
        zerolite.ZeroOptimizer(Several(model.parameters()), model)


def test_states_of_no_parameter_are_refused():
    class Decaying(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 1e-2})

        @torch.no_grad()
        def step(self, closure=None):
            steps = self.state["all"]["steps"] = self.state["all"].get("steps", 0) + 1
            for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                p.sub_(p.grad * 1e-2 / steps)

    model = nn.Linear(4, 4)
    with pytest.raises(
        NotImplementedError, match=r"Decaying: expected states of parameters, got one of 'all', which belongs to"
    ):
        zerolite.ZeroOptimizer(Decaying(model.parameters()), model)


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("no memory left")


class Branches(nn.Module):
    """A part that only some ranks use, between others; `fail` ends the backward in the middle of it."""

    def __init__(self):
        super().__init__()
        self.first, self.extra, self.last = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 2)

    def forward(self, x, extra, fail):
        x = self.first(x).tanh()
        x = Failing.apply(x) if fail else x
        return self.last(x + self.extra(x) if extra else x)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_backward_that_failed_is_over(stage, micro):
    """A loop that skips the batch and clears gradients through the model."""

    def body(comm, stage, by_model):
        model = seeded(Branches)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = zerolite.ZeroOptimizer(inner, model, stage=stage, bucket_mb=1e-4, process_group=comm)
        for step in range(3):
            for k in range(micro):
                x = torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + 10 * k + comm.rank))
                loss = model(x, extra=comm.rank == 0 and step > 0, fail=step == 0).square().mean()
                if step == 0:
                    with pytest.raises(ValueError, match="no memory left"):
                        loss.backward()
                    (model if by_model else optimizer).zero_grad()
                    continue
                loss.backward()
            if step > 0:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        with optimizer.full_params():
            return {name: value.clone() for name, value in model.state_dict().items()}

    expected = on_threads(2, body, 0, False)
    assert equal(expected[0], expected[1])
    assert equal(on_threads(2, body, stage, True), expected)


@pytest.mark.parametrize("stage,more", [(0, {}), (1, {}), (3, {}), (3, {"step_in_backward": True})])
def test_ranks_with_different_learning_rates_are_refused(stage, more):
    def body(comm):
        model = seeded(Net)
        groups = [{"params": list(model.blocks.parameters())}, {"params": [model.embed.weight], "lr": torch.tensor(0.5)}]
        inner = torch.optim.AdamW(groups if stage < 3 else model.parameters(), lr=1e-2)
        optimizer = zerolite.ZeroOptimizer(inner, model if stage == 3 else None, stage=stage, process_group=comm, **more)
        group = optimizer.param_groups[-1]

        def step(number):
            loss_of(model, tokens_for(number, 0, comm.rank)).backward()
            optimizer.step()
            optimizer.zero_grad()

        group["initial_lr"] = group["seed"] = comm.rank  # what the optimizer does not have
        step(0)
        before = group["lr"]
        group["lr"] = before * (1 + comm.rank) if stage else np.float32(0.1 * (1 + comm.rank))
        with pytest.raises(
            ValueError, match=rf"param group {len(optimizer.param_groups) - 1}: expected the same 'lr' on every rank"
        ):
            step(1)
        return True

    assert all(on_threads(2, body))


def test_a_state_dict_that_only_one_rank_has():
    def body(comm):
        model, optimizer = make(Run(), comm)
        loss_of(model, tokens_for(0, 0, comm.rank)).backward()
        optimizer.step()
        saved = optimizer.state_dict()
        wanted = (
            (TypeError, "expected a dict, as state_dict\\(\\) gives it, got NoneType")
            if comm.rank
            else (zerolite.RankError, "rank 1")
        )
        with pytest.raises(wanted[0], match=wanted[1]):
            optimizer.load_state_dict(None if comm.rank else saved)
        for damage in (
            {"zerolite": {}},
            {"param_groups": [{"lr": 1.0}]},
            {"zerolite": "x"},
            {"state": None},
        ):
            with pytest.raises((ValueError, zerolite.RankError), match="damaged or of something else"):
                optimizer.load_state_dict({**saved, **damage})
        optimizer.load_state_dict(saved)
        return True

    assert all(on_threads(2, body))


@pytest.mark.parametrize("stage", [2, 3])
def test_an_optimizer_after_remove_hooks_is_refused(stage, tmp_path):
    model, optimizer = make(Run(stage=stage), LocalComm())
    optimizer.remove_hooks()
    optimizer.remove_hooks()
    loss_of(model, tokens_for(0, 0, 0)).backward()
    saved = torch.optim.AdamW(model.parameters()).state_dict()
    calls = [optimizer.step, optimizer.full_grads, optimizer.full_state, lambda: optimizer.clip_grad_norm_(1.0)]
    calls += [lambda: optimizer.load_state_dict(saved), optimizer.full_params().__enter__, optimizer.consolidate_state_dict]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"got one after remove_hooks\(\)\. Build a new one"):
            call()
    with pytest.raises(ValueError, match="expected the model that a ZeroOptimizer was built with"):
        zerolite.save_pretrained(model, tmp_path)
