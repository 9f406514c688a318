"""Models that begin on the meta device, and values streamed from safetensors files."""

from __future__ import annotations

import json

import pytest
import torch
from models import Net, Run, equal, loss_of, make, seeded, tokens_for
from ranks import on_processes, on_threads
from torch import nn

import zerolite

st = pytest.importorskip("safetensors.torch")
GROUP = {"ZEROLITE_SHARED": "0"}


def on_meta(build, init=True):
    with zerolite.meta_init(init=init):
        return seeded(build)


def steps(model, optimizer, rank, count=2):
    for step in range(count):
        loss_of(model, tokens_for(step, 0, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {k: v.clone() for k, v in model.state_dict().items()}, optimizer.full_state()


def save_net(path, dtype=torch.float32, shards=1):
    """A file, or a directory with an index, of values that no seed of the tests gives; head.weight is tied, so left out."""
    state = {k: (v * 1.7).to(dtype) for k, v in seeded(Net, 5).state_dict().items() if k != "head.weight"}
    if shards == 1:
        st.save_file(state, path / "model.safetensors")
        return path / "model.safetensors", state
    names, weight_map = list(state), {}
    for k in range(shards):
        part = names[k::shards]
        file = f"model-{k}.safetensors"
        st.save_file({name: state[name] for name in part}, path / file)
        weight_map.update(dict.fromkeys(part, file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path, state


# ---- initialising


def begin(rank, how, run):
    if how == "eager":
        model = seeded(Net)
    elif how == "meta_init":
        model = on_meta(Net)
    else:
        with torch.device("meta"):
            model = Net()
        model.scale = nn.Parameter(torch.tensor(1.0))  # the rest has reset_parameters
    torch.manual_seed(0 if rank == 0 else 77)  # rank 0 decides
    _, optimizer = make(run, None, model)
    return steps(model, optimizer, rank)


def begin_all(rank, run):
    return [begin(rank, how, run) for how in ("eager", "meta_init", "device")]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_meta_model_begins_with_the_bits_of_an_eager_one(stage, dtype):
    eager, *others = begin_all(0, Run(stage=stage, dtype=dtype))
    for other in others:
        assert equal(eager, other)


@pytest.mark.parametrize("size,stage,env", [(2, 3, {}), (3, 3, GROUP), (2, 2, {}), (2, 1, GROUP)])
def test_ranks_begin_with_rank_0s_values(size, stage, env):
    for eager, *others in on_processes(size, begin_all, Run(stage=stage, dtype=torch.bfloat16), env=env):
        assert all(equal(eager, other) for other in others)


def test_parameters_stay_the_same_objects():
    model = on_meta(Net)
    assert all(p.is_meta for name, p in model.named_parameters() if name != "scale") and model.scale.item() == 1.0
    assert model.head.weight is model.embed.weight
    before = list(model.parameters())
    model.embed.weight.note = "kept"
    inner = torch.optim.AdamW(model.parameters())
    zerolite.ZeroOptimizer(inner, model, stage=3)
    assert all(a is b for a, b in zip(before, inner.param_groups[0]["params"], strict=True))
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True)) and model.embed.weight.note == "kept"
    assert not any(p.is_meta for p in before)
    assert nn.Linear(2, 2).weight.device.type == "cpu"  # the context has ended


class Parts(nn.Module):
    """What modules do besides reset_parameters: buffers, children filled by their parent, a frozen part."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.blocks = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(2))
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = self.attention(x, x, x)[0].transpose(1, 2)
        for block in self.blocks:
            x = block(self.norm(x))
        return self.frozen(x.transpose(1, 2))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("device", [True, False])
def test_buffers_parents_and_frozen_parts(stage, device):
    eager = seeded(Parts)
    if device:
        with torch.device("meta"):
            model = Parts()
    else:
        model = on_meta(Parts)
    torch.manual_seed(0)
    for made in (model, eager):
        inner = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
        zerolite.ZeroOptimizer(inner, made, stage=stage)
    assert equal(dict(eager.state_dict()), dict(model.state_dict()))


def test_half_of_a_module_on_meta_keeps_the_other_half():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    bias = model[1].bias.detach().clone()
    with torch.device("meta"):
        model[1].weight = nn.Parameter(torch.empty(4, 4))
    optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage=3, param_dtype=torch.bfloat16)
    with optimizer.full_params():
        assert torch.equal(model[1].bias, bias.bfloat16()) and model[1].weight.isfinite().all()
    model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("angles", torch.arange(4.0))


class Forgetful(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.extra = nn.Parameter(torch.ones(2, 2))


def build(model, **options):
    return zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, **{"stage": 3, **options})


def test_what_cannot_be_initialised_is_named():
    with pytest.raises(ValueError, match=r"'0\.table'.*got none in Bare.*reset_parameters"):
        build(nn.Sequential(on_meta(Bare)))
    with pytest.raises(ValueError, match=r"'extra'.*elements that it left out"):
        build(on_meta(Forgetful))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), Bare())
    model[1].table = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"buffer '1\.angles'.*meta_init"):
        build(model)
    with pytest.raises(TypeError, match="init: expected True, False"), zerolite.meta_init(init=3):
        pass
    model = on_meta(Bare, init=lambda module: nn.init.constant_(module.table, 3.0))
    assert torch.equal(model.angles, torch.arange(4.0))
    build(model)
    assert torch.equal(model.state_dict()["table"], torch.full((4, 4), 3.0))
    model = on_meta(Bare, init=False)
    build(model)
    assert model.state_dict()["table"].isnan().all()


# ---- loading


def load_both(comm, path, state, run):
    """Bits after two steps: eager load_state_dict before the optimizer, and a meta model that is filled from files."""
    rank, group = (comm, None) if isinstance(comm, int) else (comm.rank, comm)
    eager = seeded(Net)
    eager.load_state_dict({**state, "head.weight": state["embed.weight"]})
    first = steps(*make(run, group, eager), rank)
    model, optimizer = make(run, group, on_meta(Net, init=False))
    assert zerolite.load_pretrained(model, path) == ([], [])
    second = steps(model, optimizer, rank)
    zerolite.load_pretrained(model, path)  # again, over trained values
    loaded = {k: v.float() for k, v in model.state_dict().items()}
    return equal(first, second), all(
        torch.equal(v, state[k].float().to(run.dtype or v.dtype).float()) for k, v in loaded.items() if k in state
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_loading_from_files_equals_loading_before(stage, dtype, size, tmp_path):
    path, state = save_net(tmp_path, shards=3)
    assert on_threads(size, load_both, path, state, Run(stage=stage, dtype=dtype)) == [(True, True)] * size


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_files_in_half_precision(stored, tmp_path):
    path, state = save_net(tmp_path, stored)
    assert (
        on_threads(2, load_both, path, state, Run(stage=3, dtype=torch.bfloat16 if stored == torch.bfloat16 else None))
        == [(True, True)] * 2
    )


def load_all(rank, path, state):
    runs = [Run(stage=stage, dtype=dtype) for stage in (1, 2, 3) for dtype in (None, torch.bfloat16)]
    return [load_both(rank, path, state, run) for run in runs]


@pytest.mark.parametrize("size,env", [(2, {}), (3, GROUP)], ids=["shared", "gloo"])
def test_loading_on_processes(size, env, tmp_path):
    path, state = save_net(tmp_path, shards=2)
    assert on_processes(size, load_all, path, state, env=env) == [[(True, True)] * 6] * size
