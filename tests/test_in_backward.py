"""step_in_backward: the bits of a step after the backward, no gradients at rest, and an error for what it cannot do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import Net, Run, equal, loss_of, make, seeded, tokens_for, train, train_on
from ranks import GROUP, on_processes, on_threads, outcomes
from test_parity import DTYPES
from test_uneven import Experts, finish, uneven
from torch import nn
from torch.utils.checkpoint import checkpoint

import zerolite
from zerolite.comm.local import LocalComm

IN_BACKWARD = (("step_in_backward", True),)


def early(**options):
    return Run(stage=3, more=IN_BACKWARD, **options)


def backward(model, optimizer, step=0, rank=0):
    loss = loss_of(model, tokens_for(step, 0, rank))
    loss.backward()
    return loss


# ---- the same bits


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moments", ["fp32", "int8"])
def test_same_bits_as_a_step_after_the_backward(world, dtype, moments):
    expected = on_threads(world, train_on, Run(stage=0, dtype=DTYPES[dtype], moments=moments))[0]
    for bucket_mb in (25.0, 2e-3, 1e-6):
        found = on_threads(world, train_on, early(dtype=DTYPES[dtype], moments=moments, bucket_mb=bucket_mb))
        assert [equal(result["params"], expected["params"]) for result in found] == [True] * world
        assert equal(found[0], expected)


@pytest.mark.parametrize("micro", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_with_micro_batches_under_no_sync(micro, dtype):
    run = Run(stage=2, dtype=DTYPES[dtype], micro=micro, no_sync=True)
    expected = on_threads(2, train_on, run)[0]
    for bucket_mb in (25.0, 1e-6):
        assert equal(on_threads(2, train_on, replace(run, stage=3, more=IN_BACKWARD, bucket_mb=bucket_mb))[0], expected)


@pytest.mark.parametrize(
    "optimizer,options",
    [(torch.optim.SGD, (("momentum", 0.9),)), (torch.optim.RMSprop, ()), (torch.optim.Adam, (("weight_decay", 0.1),))],
)
def test_same_bits_for_other_optimizers(optimizer, options):
    run = Run(stage=1, optimizer=optimizer, options=options, dtype=torch.bfloat16)
    expected = on_threads(2, train_on, run)[0]
    assert equal(on_threads(2, train_on, replace(run, stage=3, more=IN_BACKWARD))[0], expected)


def train_processes(rank, runs):
    return [train(None, rank, run) for run in runs]


@pytest.mark.parametrize("env", [{}, GROUP], ids=["shared", "gloo"])
def test_same_bits_over_processes(env):
    runs = [early(dtype=dtype, bucket_mb=mb) for dtype in (None, torch.bfloat16) for mb in (25.0, 1e-6)]
    runs.append(early(dtype=torch.bfloat16, micro=2, no_sync=True))
    for rank, results in enumerate(on_processes(3, train_processes, runs, env=env)):
        for run, result in zip(runs, results, strict=True):
            assert equal(result, on_threads(3, train_on, replace(run, stage=0, more=()))[rank]), run


def large(rank, in_backward):
    """A bucket whose rounds travel in several parts."""
    model = seeded(lambda: nn.Sequential(nn.Linear(1500, 1500), nn.ReLU(), nn.Linear(1500, 1500)))
    run = Run(stage=3, dtype=torch.bfloat16, more=(("step_in_backward", in_backward),))
    model, optimizer = make(run, None, model)
    for step in range(3):
        x = torch.randn(2, 1500, generator=torch.Generator().manual_seed(2 * step + rank)).bfloat16()
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with optimizer.full_params():
        return {name: value.clone() for name, value in model.state_dict().items()}


def test_same_bits_of_rounds_in_parts():
    for found, expected in zip(on_processes(2, large, True), on_processes(2, large, False), strict=True):
        assert equal(found, expected)


def uneven_here(group, rank, bucket_mb, how, in_backward):
    stage, more = (3, IN_BACKWARD) if in_backward else (0, ())
    return uneven(group, rank, stage, bucket_mb, 1, how, more=more)


HOW = ["plain", "held", "order", "shared", "memory"]


@pytest.mark.parametrize("how", HOW)
def test_same_bits_where_ranks_use_other_experts(how):
    for mb in (25.0, 1e-6):
        run = on_threads(3, lambda comm, mb=mb: [uneven_here(comm, comm.rank, mb, how, way) for way in (False, True)])
        assert [equal(expected, found) for expected, found in run] == [True] * 3


def uneven_processes(rank):
    return [uneven_here(None, rank, 1e-6, how, True) for how in HOW]


@pytest.mark.parametrize("env", [{}, GROUP], ids=["shared", "gloo"])
def test_same_bits_where_processes_use_other_experts(env):
    found = on_processes(2, uneven_processes, env=env)
    for k, how in enumerate(HOW):
        expected = on_threads(2, lambda comm, how=how: uneven_here(comm, comm.rank, 1e-6, how, False))
        assert [equal(found[rank][k], expected[rank]) for rank in range(2)] == [True, True], how


def changing(comm, run):
    """A parameter that is frozen first, a param group that comes later, writes between steps, a checkpoint in the block."""
    model = seeded(Net)
    for p in model.blocks[1].parameters():
        p.requires_grad_(False)
    inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer = zerolite.ZeroOptimizer(
        inner, model, stage=run.stage, param_dtype=run.dtype, process_group=comm, **dict(run.more)
    )
    for step in range(5):
        if step == 1:
            for p in model.blocks[1].parameters():
                p.requires_grad_(True)
            optimizer.add_param_group({"params": list(model.blocks[1].parameters()), "lr": 1e-3})
        if step == 3:
            with optimizer.full_params():
                model.scale.mul_(1.5)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        x = model.embed(tokens_for(step, 0, comm.rank)) * model.scale
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        model.head(model.norm(x)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with optimizer.full_params():
        return {name: value.clone() for name, value in model.state_dict().items()}, optimizer.full_state()


@pytest.mark.filterwarnings("ignore:zerolite")
def test_same_bits_where_a_script_changes_things_between_steps():
    run = Run(stage=3, dtype=torch.bfloat16)
    for rank, found in enumerate(on_threads(2, changing, replace(run, more=IN_BACKWARD))):
        assert equal(found, on_threads(2, changing, run)[rank])


def test_parameters_that_begin_to_train_are_updated_in_the_step():
    """requires_grad_(True) after the build: states come as the backward ends, and step() updates what it did not."""

    def body(comm, run):
        model = seeded(Net)
        model.norm.requires_grad_(False)
        model, optimizer = make(run, comm, model)
        for step in range(3):
            model.norm.requires_grad_(step > 0)
            backward(model, optimizer, step, comm.rank)
            result = finish(model, optimizer)
        return result

    for found, expected in zip(on_threads(2, body, early()), on_threads(2, body, Run(stage=2)), strict=True):
        assert equal(found, expected)


def test_a_state_dict_between_backward_and_step_is_that_after_the_step():
    model, optimizer = make(early(dtype=torch.bfloat16), LocalComm())
    backward(model, optimizer)
    before = optimizer.state_dict()
    optimizer.step()
    after = optimizer.state_dict()
    assert {k: v for k, v in before.items() if k != "param_groups"}.keys() == {k for k in after if k != "param_groups"}
    assert equal(before["state"], after["state"]) and before["state"]


def test_step_takes_a_closure():
    model, optimizer = make(early(), LocalComm())
    expected = train(LocalComm(), 0, Run(stage=0, steps=2))["losses"]
    losses = []
    for step in range(2):

        def closure(step=step):
            optimizer.zero_grad()
            return backward(model, optimizer, step)

        losses.append(optimizer.step(closure).item())
    assert losses == expected


# ---- memory


@pytest.mark.parametrize("world", [1, 2])
def test_no_gradient_rests_between_backward_and_step(world):
    def body(comm):
        model, optimizer = make(early(dtype=torch.bfloat16, bucket_mb=1e-3), comm)
        for step in range(2):
            backward(model, optimizer, step, comm.rank)
            memory = optimizer.memory()
            optimizer.step()
            optimizer.zero_grad()
        return memory

    memory = on_threads(world, body)[0]
    assert memory.live == memory.planned and memory.live["grads"] == 0
    assert memory.live["params"] and memory.live["states"]


def test_the_plan_says_so():
    plan = zerolite.plan("gpt2", world=2, stage=3, param_dtype=torch.bfloat16, step_in_backward=True)
    other = zerolite.plan("gpt2", world=2, stage=3, param_dtype=torch.bfloat16)
    assert plan.at_rest("grads") == 0 < other.at_rest("grads") and plan.label == "stage 3, step_in_backward=True"
    largest = max(row.full for row in plan.rows)
    assert plan.host_peak <= other.host_peak - 2 * other.at_rest("grads") + 2 * largest
    options = {"param_dtype": torch.bfloat16, "host_bytes": plan.host_peak}
    auto = zerolite.plan("gpt2", world=2, stage="auto", step_in_backward=True, **options)
    assert auto.stage == 3 and auto.step_in_backward


def test_a_plan_that_does_not_fit_names_the_nearest():
    with pytest.raises(ValueError, match=r"stage 3, step_in_backward=True on 2 .*nearest that fit: .*4 ranks"):
        zerolite.plan("gpt2", world=2, ranks_per_host=1, stage=3, step_in_backward=True, host_bytes="1G")


def test_auto_builds_stage_3():
    model = seeded(Net)
    inner = torch.optim.AdamW(model.parameters())
    assert zerolite.ZeroOptimizer(inner, model, stage="auto", step_in_backward=True, process_group=LocalComm()).plan.stage == 3


def test_a_timeline_shows_updates_inside_the_backward():
    model, optimizer = make(early(dtype=torch.bfloat16, bucket_mb=1e-3), LocalComm())
    with zerolite.MemoryTimeline(optimizer) as timeline:
        backward(model, optimizer)
        optimizer.step()
    seen = [sample.work for sample in timeline.samples if sample.phase == "backward"]
    assert "update" in seen and timeline.peak.sample.live > 0


# ---- what cannot be had with it


@pytest.mark.parametrize(
    "options,words",
    [
        ({"stage": 2}, "expected stage=3, got stage=2.*Use stage=3"),
        ({"stage": 3, "offload": "states"}, "expected offload=None, got offload='states'"),
        ({"stage": 3, "step_in_backward": 1}, "step_in_backward: expected True or False, got 1"),
    ],
)
def test_options_that_do_not_go_with_it(options, words):
    model = seeded(Net)
    with pytest.raises(ValueError, match=words):
        zerolite.ZeroOptimizer(
            torch.optim.AdamW(model.parameters()), model, process_group=LocalComm(), **{"step_in_backward": True, **options}
        )
    if options.get("step_in_backward") is None:
        with pytest.raises(ValueError, match=words):
            zerolite.plan(seeded(Net), step_in_backward=True, **options)


def test_micro_batches_of_a_plan():
    with pytest.raises(ValueError, match=r"micro_batches: expected 1 with step_in_backward=True.*no_sync"):
        zerolite.plan(seeded(Net), stage=3, step_in_backward=True, micro_batches=2)


USES = {
    "clip": (lambda model, optimizer: nn.utils.clip_grad_norm_(model.parameters(), 1.0), "used up.*without step_in_backward"),
    "our clip": (lambda model, optimizer: optimizer.clip_grad_norm_(1.0), "used up.*without step_in_backward"),
    "read": (lambda model, optimizer: model.scale.grad.norm(), "used up.*without step_in_backward"),
    "scale": (lambda model, optimizer: model.scale.grad.mul_(2.0), "used up.*without step_in_backward"),
    "full_grads": (lambda model, optimizer: optimizer.full_grads(), "used up.*without step_in_backward"),
    "zero_grad": (lambda model, optimizer: optimizer.zero_grad(), "expected after step.*Call step"),
    "backward": (lambda model, optimizer: backward(model, optimizer, 1), "expected step.* after the last one.*no_sync"),
    "unscale": (
        lambda model, optimizer: torch.amp.GradScaler("cpu").unscale_(optimizer),
        "used up.*without step_in_backward|No scale|scale",
    ),
}


@pytest.mark.parametrize("what", USES)
def test_gradients_cannot_be_used_after_the_backward(what):
    use, words = USES[what]
    model, optimizer = make(early(), LocalComm())
    backward(model, optimizer)
    with pytest.raises((RuntimeError, AssertionError), match=words):
        use(model, optimizer)
    expected, other = make(Run(stage=0), LocalComm())
    backward(expected, other)
    for one in (optimizer, other):
        one.step()
    with optimizer.full_params():
        assert all(map(equal, model.parameters(), expected.parameters()))


@pytest.mark.parametrize("assigned", [True, False])
def test_gradients_that_are_replaced_before_the_step_are_noticed(assigned):
    model, optimizer = make(early(), LocalComm())
    backward(model, optimizer)
    model.scale.grad = torch.ones(()) if assigned else None
    with pytest.raises(RuntimeError, match=r"'scale': p.grad was set to None or assigned between.*after step"):
        optimizer.step()


def test_a_second_backward_without_handles_is_noticed():
    model, optimizer = make(early(), LocalComm())
    backward(model, optimizer)
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"expected step\(\) after the last one"):
        backward(model, optimizer, 1)


@pytest.mark.parametrize("tensor", [False, True])
def test_param_groups_that_change_before_the_step_are_noticed(tensor):
    model = seeded(Net)
    inner = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2) if tensor else 1e-2)
    optimizer = zerolite.ZeroOptimizer(inner, model, stage=3, step_in_backward=True, process_group=LocalComm())
    for step in range(2):
        backward(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:  # after the step, as schedulers do
            group["lr"] *= 0.5
    backward(model, optimizer, 2)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # adds an option, which no backward has read
    optimizer.param_groups[0]["lr"] *= 0.5
    with pytest.raises(RuntimeError, match=r"expected param groups as the backward found them, got another lr\. With"):
        optimizer.step()


def test_a_gradient_that_is_not_finite_raises_on_every_rank_and_a_checkpoint_helps():
    def body(comm, run):
        model, optimizer = make(run, comm)
        backward(model, optimizer, 0, comm.rank)
        optimizer.step()
        optimizer.zero_grad()
        with optimizer.full_params():
            saved = {name: value.clone() for name, value in model.state_dict().items()}
        states = optimizer.state_dict()
        if run.more:
            loss = loss_of(model, tokens_for(1, 0, comm.rank))
            with pytest.raises(FloatingPointError, match=r"not finite, on some rank.*Load a checkpoint"):
                (loss * (float("inf") if comm.rank == 1 else 1.0)).backward()
            with pytest.raises(RuntimeError, match=r"after one that failed.*Load a checkpoint"):
                optimizer.step()
            with pytest.warns(UserWarning, match="between two steps until a checkpoint"):
                optimizer.zero_grad()
            with optimizer.full_params():
                model.load_state_dict(saved)
            optimizer.load_state_dict(states)
        backward(model, optimizer, 2, comm.rank)
        return finish(model, optimizer)

    for found, expected in zip(on_threads(2, body, early()), on_threads(2, body, Run(stage=3)), strict=True):
        assert equal(found, expected)


class Detached(Net):
    """Weights that are used once more, where autograd does not follow, before the part whose gradients come first."""

    def forward(self, tokens):
        x = self.embed(tokens) * self.scale
        x = nn.functional.linear(x, self.tail.weight.detach())
        return self.head(self.tail(self.norm(x)))

    def __init__(self):
        super().__init__(blocks=0)
        self.tail = nn.Linear(13, 13)  # goes out first


def test_weights_that_are_still_needed_after_their_update_are_noticed():
    model, optimizer = make(early(bucket_mb=1e-6), LocalComm(), seeded(Detached))
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        backward(model, optimizer)


def test_reentrant_checkpoints_are_refused_where_a_gradient_comes_again():
    def body(comm):
        model, optimizer = make(early(), comm, seeded(Experts))
        model.reentrant, model.order = True, (0, 0, 1)
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            backward(model, optimizer, 0, comm.rank)
        return True

    assert on_threads(2, body) == [True, True]


def test_it_is_one_of_the_options_that_ranks_compare():
    def body(comm):
        with pytest.raises(ValueError, match="step_in_backward"):
            make(Run(stage=3, more=(("step_in_backward", comm.rank == 1),)), comm)
        return True

    assert on_threads(2, body) == [True, True]


def test_a_backward_that_failed_is_told_whatever_cleared_it():
    model, optimizer = make(early(bucket_mb=1e-6), LocalComm(), seeded(lambda: Net(tied=False)))
    handle = model.blocks[0].up.weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backward(model, optimizer)
    handle.remove()
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"after one that failed.*Load a checkpoint"):
        backward(model, optimizer, 1)


def test_a_backward_that_fails_leaves_no_step_behind_it():
    model, optimizer = make(early(bucket_mb=1e-6), LocalComm(), seeded(lambda: Net(tied=False)))
    handle = model.blocks[0].up.weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backward(model, optimizer)
    with pytest.raises(RuntimeError, match=r"after one that failed.*Load a checkpoint"):
        optimizer.step()
    with pytest.warns(UserWarning, match="between two steps"):
        optimizer.zero_grad()
    handle.remove()
    backward(model, optimizer, 1)
    optimizer.step()


class Adapted(nn.Module):
    """A block whose trained part comes last: its gradients are there while the frozen part is still needed."""

    def __init__(self):
        super().__init__()
        self.frozen, self.adapter = nn.Linear(8, 8), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.adapter(torch.tanh(self.frozen(x + self.extra)))


class Adapters(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(8))
        self.blocks = nn.ModuleList([Adapted(), Adapted()])

    def forward(self, x):
        for block in self.blocks:
            block.extra = 2 * self.shift  # behind the unit's back
        return self.blocks[1](x) + self.blocks[0](x)


def test_a_unit_that_is_needed_again_for_its_frozen_part_is_gathered_again():
    def body(comm, run):
        model = seeded(Adapters)
        inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        optimizer = zerolite.ZeroOptimizer(inner, model, stage=run.stage, process_group=comm, **dict(run.more))
        for step in range(3):
            model(torch.full((2, 8), 1.0 + step + comm.rank)).square().sum().backward()
            result = finish(model, optimizer)
        return result

    for found, expected in zip(on_threads(2, body, early()), on_threads(2, body, Run(stage=3)), strict=True):
        assert equal(found, expected)


class Parts(nn.Module):
    """A block with a part that a rank may leave out, and one that is frozen until the script says so."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}) for _ in range(2))
        self.used = True

    def forward(self, x):
        x = self.base(x)
        for k, block in enumerate(self.blocks):
            x = block["a"](x)
            x = block["b"](x) if self.used or k == 0 else x
        return x


def thawed(group, rank, run):
    """What begins to train does so in a backward in which ranks use different parameters."""
    model = seeded(Parts)
    model.base.requires_grad_(False)
    model, optimizer = make(run, group, model)
    model.base.requires_grad_(True)
    model.used = rank > 0
    for step in range(2):
        model(torch.full((2, 8), 1.0 + step)).square().sum().backward()
        result = finish(model, optimizer)
    return result


def thawed_processes(rank):
    return [thawed(None, rank, early(bucket_mb=mb)) for mb in (25.0, 1e-6)]


@pytest.mark.parametrize("env", [{}, GROUP], ids=["shared", "gloo"])
def test_what_begins_to_train_where_ranks_use_different_parameters(env):
    found = on_processes(2, thawed_processes, env=env)
    for k, mb in enumerate((25.0, 1e-6)):
        expected = on_threads(2, lambda comm, mb=mb: thawed(comm, comm.rank, Run(stage=3, bucket_mb=mb)))
        assert [equal(found[rank][k], expected[rank]) for rank in range(2)] == [True, True]


def test_a_gradient_that_is_not_finite_where_its_owner_has_none():
    def body(comm):
        model, _optimizer = make(early(bucket_mb=1e-6), comm, seeded(Parts))
        model.used = comm.rank == 1  # rank 0 owns the first half of what only rank 1 uses
        if comm.rank == 1:
            model.blocks[1]["b"].weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), float("inf")))
        with pytest.raises(FloatingPointError, match="not finite, on some rank"):
            model(torch.ones(2, 8)).square().sum().backward()
        return True

    assert on_threads(2, body) == [True, True]


def test_a_gradient_that_is_not_finite_of_what_begins_to_train():
    model = seeded(Net)
    model.norm.requires_grad_(False)
    model, optimizer = make(early(), LocalComm(), model)
    model.norm.requires_grad_(True)
    model.norm.bias.register_hook(lambda grad: grad * float("inf"))
    backward(model, optimizer)
    with pytest.raises(FloatingPointError, match=r"begins to train is not finite.*Load a checkpoint"):
        optimizer.step()
    with pytest.warns(UserWarning, match="between two steps"):
        optimizer.zero_grad()


def written_by_a_hook(rank, how):
    model, optimizer = make(early(), None)
    last = model.blocks[0].norm.bias

    def hook(p):
        with torch.no_grad():
            p.clamp_(-5.0, 5.0) if how == "version" else p.data.clamp_(-5.0, 5.0)

    last.register_post_accumulate_grad_hook(hook)
    backward(model, optimizer, 0, rank)
    return finish(model, optimizer)


@pytest.mark.parametrize("env", [{}, GROUP], ids=["shared", "gloo"])
def test_writes_by_hooks_of_the_backward_are_refused(env):
    for kind, error in outcomes(2, written_by_a_hook, "version", env=env, timeout=10):
        assert kind == "error" and "written inside of a backward (by a hook)" in error[1]


def test_writes_by_hooks_that_no_version_tells_of_do_not_hold_up_an_update_of_shared_parameters():
    expected = on_threads(2, trained, early(), 1)
    for found, other in zip(on_processes(2, written_by_a_hook, "data"), expected, strict=True):
        assert equal(found, other)


def trained(comm, run, steps):
    model, optimizer = make(run, comm)
    for step in range(steps):
        backward(model, optimizer, step, comm.rank)
        result = finish(model, optimizer)
    return result


def test_a_backward_inside_full_params_is_refused():
    model, optimizer = make(early(), LocalComm())
    with (
        optimizer.full_params(),
        torch.enable_grad(),
        pytest.raises(RuntimeError, match=r"expected outside of `with optimizer"),
    ):
        backward(model, optimizer)


@pytest.mark.parametrize("what", ["load_state_dict", "add_param_group", "model.zero_grad"])
def test_what_would_come_between_the_update_and_its_step_is_refused(what):
    model, optimizer = make(early(), LocalComm())
    states = optimizer.state_dict()
    backward(model, optimizer)
    with pytest.raises(RuntimeError, match=r"between backward.* and step|used up"):
        if what == "load_state_dict":
            optimizer.load_state_dict(states)
        elif what == "add_param_group":
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        else:
            model.zero_grad(set_to_none=False)
    optimizer.step()
    optimizer.zero_grad()
    backward(model, optimizer, 1)
    assert equal(finish(model, optimizer), trained(LocalComm(), Run(stage=3), 2))


def test_a_block_that_is_frozen_on_the_way_trains_on_without():
    def body(comm, run):
        model, optimizer = make(run, comm)
        for step in range(4):
            model.blocks[1].requires_grad_(step != 1 and step != 2)
            backward(model, optimizer, step, comm.rank)
            result = finish(model, optimizer)
        return result

    for found, expected in zip(on_threads(2, body, early()), on_threads(2, body, Run(stage=3)), strict=True):
        assert equal(found, expected)


@pytest.mark.parametrize("none", [True, False])
def test_gradient_penalties_are_no_steps(none):
    """torch.autograd.grad through the model runs its hooks without a gradient of any parameter."""

    def body(comm, run):
        model, optimizer = make(run, comm)
        for step in range(3):
            with optimizer.no_sync():
                backward(model, optimizer, step, comm.rank)
            x = model.embed(tokens_for(step, 0, comm.rank)).detach().requires_grad_()
            y = x * model.scale
            for block in model.blocks:
                y = block(y)
            (grad,) = torch.autograd.grad(model.head(model.norm(y)).square().mean(), x)
            (backward(model, optimizer, step + 7, comm.rank) * grad.norm()).item()
            optimizer.step()
            optimizer.zero_grad(set_to_none=none)
        with optimizer.full_params():
            return {name: value.clone() for name, value in model.state_dict().items()}, optimizer.full_state()

    for found, expected in zip(on_threads(2, body, early()), on_threads(2, body, Run(stage=3)), strict=True):
        assert equal(found, expected)


def test_a_graph_that_torch_autograd_grad_has_read_is_used_again():
    """A penalty on the gradient of the same forward: nothing is updated in the first pass through it."""

    def body(comm, run):
        model, optimizer = make(run, comm)
        for step in range(3):
            x = model.embed(tokens_for(step, 0, comm.rank)).detach().requires_grad_()
            y = x * model.scale
            for block in model.blocks:
                y = block(y)
            out = model.head(model.norm(y)).square().mean()
            (grad,) = torch.autograd.grad(out, x, create_graph=True)
            (out + (grad.norm() - 1).square()).backward()
            optimizer.step()
            optimizer.zero_grad()
        with optimizer.full_params():
            return {name: value.clone() for name, value in model.state_dict().items()}, optimizer.full_state()

    for found, expected in zip(on_threads(2, body, early()), on_threads(2, body, Run(stage=3)), strict=True):
        assert equal(found, expected)


def test_a_model_whose_optimizer_is_gone_goes_on():
    model, optimizer = make(early(), LocalComm())
    backward(model, optimizer)
    optimizer.step()
    optimizer.zero_grad()
    del optimizer
    loss = backward(model, None, 1)
    assert equal(loss, loss_of(model, tokens_for(1, 0, 0)))  # nobody updates it any more
