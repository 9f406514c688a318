"""Bad input: each a clear error when the optimizer is built, or at the first step that can see it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import Net, Run, equal, loss_of, make, seeded, tokens_for
from ranks import on_threads
from torch import nn

import zerolite
from zerolite.comm.local import LocalComm


def build(model=None, inner=None, **options):
    model = seeded(Net) if model is None else model
    inner = torch.optim.AdamW(model.parameters()) if inner is None else inner
    options.setdefault("process_group", LocalComm())
    return zerolite.ZeroOptimizer(inner, options.pop("pass_model", model), **options)


@pytest.mark.parametrize(
    "options,error,text",
    [
        ({"stage": 4}, ValueError, "stage: expected 0, 1, 2 or 3, got 4"),
        ({"stage": "2"}, ValueError, "stage: expected"),
        ({"stage": True}, ValueError, "stage: expected"),
        ({"offload": "state"}, ValueError, "offload: expected None, 'states' or 'all', got 'state'"),
        ({"offload": "cpu"}, ValueError, "offload: expected"),
        ({"stage": 2, "offload": "all"}, ValueError, "expected stage=3"),
        ({"moments": "int4"}, ValueError, "moments: expected"),
        ({"param_dtype": torch.int8}, ValueError, "param_dtype: expected"),
        ({"param_dtype": "bf16"}, ValueError, "param_dtype: expected"),
        ({"bucket_mb": 0}, ValueError, "bucket_mb: expected more than 0"),
        ({"stage": 3, "pass_model": None}, ValueError, "stage 3 shards the parameters of a module, got None"),
        ({"pass_model": "model"}, TypeError, "model: expected an nn.Module"),
        ({"inner": "adamw"}, TypeError, "expected a torch.optim.Optimizer instance"),
    ],
)
def test_options(options, error, text):
    model = seeded(Net)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(error) as found:
        build(model, **options)
    assert text in str(found.value)
    for name, p in model.named_parameters():  # nothing was changed
        assert p.data_ptr() == before[name][0] and torch.equal(p, before[name][1])


def test_an_empty_parameter_list_is_torchs_error():
    with pytest.raises(ValueError, match="empty parameter list"):
        torch.optim.AdamW([])


def test_all_frozen():
    model = seeded(Net).requires_grad_(False)
    with pytest.raises(ValueError, match="at least one parameter that requires a gradient"):
        build(model)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_the_same_parameter_twice():
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"'group 0 parameter 1'.*twice|twice"):
        build(inner=torch.optim.AdamW([p, p]), pass_model=None)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64])
def test_unsupported_dtypes(dtype):
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    with pytest.raises(TypeError, match="expected float32, bfloat16 or float16, got"):
        build(inner=torch.optim.AdamW([p]), pass_model=None)


def test_meta_parameters_and_other_devices():
    p = nn.Parameter(torch.empty(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"meta device.*Pass the model"):
        build(inner=torch.optim.AdamW([p]), pass_model=None)


def test_param_dtype_of_a_bf16_model():
    with pytest.raises(ValueError, match=r"param_dtype=torch\.float16 expects float32"):
        build(seeded(Net).bfloat16(), param_dtype=torch.float16)


def test_wrapped_models_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        model = nn.parallel.DistributedDataParallel(seeded(Net))
        with pytest.raises(TypeError, match="expected a plain module, got DistributedDataParallel"):
            build(model)
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        sharded = torch.distributed.fsdp.fully_shard(nn.Linear(4, 4), mesh=mesh)
        with pytest.raises(TypeError, match=r"FSDP|DTensor"):
            build(sharded)
        with pytest.raises(TypeError, match="DTensor"):
            build(inner=torch.optim.AdamW(sharded.parameters()), pass_model=None)
    finally:
        torch.distributed.destroy_process_group()


def test_sparse_gradients():
    with pytest.raises(ValueError, match=r"module '0'.*Embedding\(sparse=True\)"):
        build(nn.Sequential(nn.Embedding(3, 3, sparse=True)))
    model = nn.Embedding(3, 3, sparse=True)
    zero = build(inner=torch.optim.AdamW(model.parameters()), pass_model=None)  # without a model it is seen in backward
    assert zero.plan.numel == 9
    with pytest.raises(ValueError, match="dense gradient"):
        model(torch.tensor([1])).sum().backward()


class Norm(torch.optim.SGD):
    """A trust ratio: needs the whole parameter."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad / p.grad.norm(), alpha=-group["lr"])


@pytest.mark.parametrize(
    "make_inner,text",
    [
        (lambda ps: torch.optim.LBFGS(ps), "LBFGS"),
        (lambda ps: torch.optim.Adafactor(ps), "Adafactor"),
        (lambda ps: torch.optim.Muon([p for p in ps if p.dim() == 2]), "Muon"),
        (lambda ps: torch.optim.SparseAdam(ps), "SparseAdam"),
        (lambda ps: Norm(ps, lr=0.1), "Norm: its update of an element depends on other elements"),
        (lambda ps: torch.optim.AdamW(ps, differentiable=True), "differentiable=False"),
        (lambda ps: torch.optim.AdamW(ps, capturable=True), "capturable=False"),
    ],
)
def test_optimizers_that_cannot_be_cut(make_inner, text):
    model = seeded(Net)
    with pytest.raises(NotImplementedError, match=text):
        build(model, make_inner(list(model.parameters())), pass_model=None)


def test_wrapping_twice():
    zero = build()
    with pytest.raises(TypeError, match="Wrap once"):
        build(inner=zero)


def test_stage_3_wants_exactly_the_models_parameters():
    model = seeded(Net)
    other = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="expected a parameter of the model"):
        build(model, torch.optim.AdamW([*model.parameters(), other]), stage=3)
    with pytest.raises(ValueError, match="requires a gradient but is not in the optimizer"):
        build(model, torch.optim.AdamW(model.blocks.parameters()), stage=3)


def test_overlap_is_a_truth_value():
    with pytest.raises(ValueError, match="overlap: expected True or False, got 'no'"):
        build(overlap="no")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_wrapped_optimizer_is_not_stepped(stage):
    model = seeded(Net)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = build(model, inner, stage=stage)
    loss_of(model, tokens_for(0, 0, 0)).backward()
    with pytest.raises(RuntimeError, match="expected to be called on the ZeroOptimizer, got called on the AdamW that it wraps"):
        inner.step()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.remove_hooks()
    loss_of(seeded(Net), tokens_for(0, 0, 0)).backward()
    inner.step()  # it is the script's again


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_model_of_other_parameters_is_refused(stage):
    model = seeded(Net)
    inner = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"Build the\s+optimizer from this model's parameters\(\)"):
        build(copy.deepcopy(model), inner, stage=stage)


def test_stage_3_takes_no_parameter_that_came_into_the_model_later():
    model, optimizer = make(Run(stage=3), LocalComm())
    model.head = nn.Linear(13, 3)
    with pytest.raises(
        ValueError, match=r"'head.weight': expected one that the model had when ZeroOptimizer was built.*remove_hooks"
    ):
        optimizer.add_param_group({"params": model.head.parameters()})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("stage", [2, 3])
def test_a_replaced_parameter_is_seen_at_the_step(stage):
    model, optimizer = make(Run(stage=stage), LocalComm())
    model.norm.weight = nn.Parameter(torch.ones(13))
    loss_of(model, tokens_for(0, 0, 0)).backward()
    with pytest.raises(RuntimeError, match=r"parameter 'norm\.weight': expected the parameter that the optimizer was built"):
        optimizer.step()


def test_a_replaced_storage_is_seen_at_the_step():
    for change in (lambda m: m.double(), lambda m: setattr(m.norm.weight, "data", torch.ones(13))):
        model, optimizer = make(Run(), LocalComm())
        change(model)
        with pytest.raises(RuntimeError, match="its storage was replaced"):
            optimizer.step()


def test_two_parameters_on_one_memory_are_refused():
    model = Net(tied=False)
    model.head.weight.data = model.embed.weight.data
    with pytest.raises(
        ValueError, match=r"parameters '(embed|head)\.weight' and '(head|embed)\.weight' are two parameters on the"
    ):
        make(Run(), LocalComm(), model)
    model.head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="Tie them by using one parameter twice"):
        make(Run(), LocalComm(), model)
    model.embed.weight.requires_grad_(False)  # neither changes
    zerolite.ZeroOptimizer(torch.optim.AdamW(model.blocks.parameters()), model, process_group=LocalComm())

    flat = torch.randn(30)  # neighbours in one tensor are no twins
    one, two = nn.Parameter(flat[:10].view(2, 5)), nn.Parameter(flat[10:])
    zerolite.ZeroOptimizer(torch.optim.AdamW([one, two]), process_group=LocalComm())
    three, four = nn.Parameter(flat[9:12]), nn.Parameter(flat[10:])
    with pytest.raises(ValueError, match="on the same memory"):
        zerolite.ZeroOptimizer(torch.optim.AdamW([four, three]), process_group=LocalComm())


def test_sparse_buffers():
    def body(comm):
        model = Net()
        model.register_buffer("adjacency", torch.eye(3).to_sparse())
        if comm.size > 1:
            with pytest.raises(NotImplementedError, match="buffer 'adjacency': expected a dense buffer"):
                make(Run(), comm, model)
            return
        make(Run(), comm, model)
        assert torch.equal(model.adjacency.to_dense(), torch.eye(3))

    for world in (1, 2):
        on_threads(world, body)


def test_rounding_what_another_optimizer_may_train_is_told():
    model = Net()
    with pytest.warns(UserWarning, match=r"parameter 'scale' \(4 in all\) requires a gradient and is not in this optimizer"):
        zerolite.ZeroOptimizer(
            torch.optim.AdamW(model.blocks.parameters()), model, param_dtype=torch.bfloat16, process_group=LocalComm()
        )
    assert model.embed.weight.dtype == torch.bfloat16


class Scaled(nn.Module):
    """A block with a parameter of one element, which one NaN can stand for without repeating itself."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 1)])
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x) * self.scale).sum()


def _replace(p, value):
    p.data = torch.full(p.shape, value)


RELEASED = {
    "one element": (lambda model: model.scale.detach().clamp_(0, 4), "parameter 'scale': written while it is released"),
    "shape (1,)": (lambda model: model.blocks[1].bias.detach().zero_(), "parameter 'blocks.1.bias': written while"),
    "a fill": (lambda model: model.blocks[0].bias.detach().zero_(), "parameter 'blocks.0.bias': written while"),
    "an element": (lambda model: model.blocks[0].weight.detach().__setitem__((0, 1), 0.0), "'blocks.0.weight': written while"),
    "a fill of data": (lambda model: model.blocks[0].weight.data.fill_(1.0), "'blocks.0.weight': written while"),
    "its data": (lambda model: model.scale.data.fill_(2.0), "parameter 'scale': written while it is released"),
    "other data": (lambda model: _replace(model.blocks[0].weight, 2.0), "'blocks.0.weight': its storage was replaced"),
    "a vector": (
        lambda model: nn.utils.vector_to_parameters(torch.ones(17), model.parameters()),
        "its storage was replaced",
    ),
}
NEEDED = {
    "forward": lambda model, optimizer: model(torch.ones(2, 3).bfloat16()),
    "state_dict": lambda model, optimizer: model.state_dict(),
    "full_params": lambda model, optimizer: optimizer.full_params().__enter__(),
    "part": lambda model, optimizer: optimizer.state_dict(),
    "whole": lambda model, optimizer: optimizer.full_state(),
}


@pytest.mark.parametrize("write", RELEASED)
@pytest.mark.parametrize("need", NEEDED)
def test_a_write_to_a_released_parameter_is_never_lost_silently(write, need):
    model = Scaled()
    optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage=3, param_dtype=torch.bfloat16)
    model(torch.ones(2, 3).bfloat16()).backward()
    optimizer.step()
    optimizer.zero_grad()
    change, message = RELEASED[write]
    change(model)
    with pytest.raises(RuntimeError, match=message):
        NEEDED[need](model, optimizer)
    if message.endswith("released"):  # told once; the value is what it was
        assert model.state_dict()["scale"].isfinite().all()


def test_a_released_parameter_of_one_element_is_nan_again_after_a_write():
    model = Scaled()
    optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage=3)
    with optimizer.full_params():
        before = model.scale.detach().clone()
    model.scale.data.fill_(3.0)
    with pytest.raises(RuntimeError, match="written while"):
        model(torch.ones(2, 3))
    with optimizer.full_params():
        assert torch.equal(model.scale, before)
    assert model.scale.isnan()
    model(torch.ones(2, 3)).backward()
    optimizer.step()


def test_a_step_twice_and_a_backward_without_zero_grad():
    model, optimizer = make(Run(), LocalComm())
    loss_of(model, tokens_for(0, 0, 0)).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="step\\(\\) was called twice"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="without zero_grad"):
        loss_of(model, tokens_for(0, 0, 0)).backward()
    with pytest.raises(RuntimeError, match="used up"):
        model.norm.weight.grad.clone()
    assert "used up" in repr(model.norm.weight.grad)


def test_create_graph():
    model, _ = make(Run(), LocalComm())
    with pytest.raises(NotImplementedError, match="create_graph"):
        loss_of(model, tokens_for(0, 0, 0)).backward(create_graph=True)


def test_a_backward_through_parameters_that_a_step_has_changed():
    """Torch raises where a saved tensor was modified in place; so must a kernel that writes behind its back."""
    for stage in (0, 1, 2):
        model, optimizer = make(Run(stage=stage), LocalComm())
        late = loss_of(model, tokens_for(0, 0, 0))
        loss_of(model, tokens_for(1, 0, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()


def test_pickling_and_copying_are_refused():
    model, optimizer = make(Run(), LocalComm())
    for action in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="state_dict"):
            action(optimizer)
    loss_of(model, tokens_for(0, 0, 0)).backward()
    with pytest.raises(TypeError, match="handle"):
        pickle.dumps(model.norm.weight.grad)
    assert equal(copy.deepcopy(model.norm.weight.grad), model.norm.weight.grad.clone())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("clip", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(value, stage, clip):
    model, optimizer = make(Run(stage=stage, dtype=torch.bfloat16), LocalComm())
    loss_of(model, tokens_for(0, 0, 0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy(optimizer.full_state()), {name: v.clone() for name, v in model.state_dict().items()}
    (loss_of(model, tokens_for(1, 0, 0)) * value).backward()
    if clip:
        assert not torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert equal(before, (optimizer.full_state(), dict(model.state_dict())))
    optimizer.zero_grad()
    loss_of(model, tokens_for(2, 0, 0)).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1 and not equal(before[0], optimizer.full_state())


@pytest.mark.parametrize("stage", [2, 3])
def test_the_warning_names_a_parameter_that_is_not_finite_itself(stage):
    with zerolite.meta_init(init=False):
        model = Net()
    optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage=stage)
    loss_of(model, tokens_for(0, 0, 0)).backward()
    with pytest.warns(UserWarning, match=r"Parameter '.*' is not finite either, since meta_init\(init=False\): call load_pre"):
        optimizer.step()
    model, optimizer = make(Run(stage=stage), LocalComm())
    with optimizer.full_params():
        model.norm.weight[1] = torch.inf
    loss_of(model, tokens_for(0, 0, 0)).backward()
    with pytest.warns(UserWarning, match=r"Parameter 'norm\.weight' is not finite either\.$"):
        optimizer.step()


def test_process_groups_that_are_none():
    with pytest.raises(TypeError, match=r"process_group: expected a torch\.distributed process group.*got 'gloo'"):
        zerolite.ZeroOptimizer(torch.optim.AdamW([nn.Parameter(torch.ones(2))]), process_group="gloo")


def test_huge_but_finite_gradients_are_applied():
    model, optimizer = make(Run(), LocalComm())
    (loss_of(model, tokens_for(1, 0, 0)) * 1e31).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 0 and all(p.isfinite().all() for p in model.parameters())
