"""save_pretrained: files that everyone reads, of every stage, that a kill or a full disk cannot spoil."""

from __future__ import annotations

import json

import pytest
import torch
from models import Net, Run, equal, loss_of, make, seeded, tokens_for
from ranks import on_processes, on_threads
from torch import nn

import zerolite
from zerolite import saved
from zerolite.comm.local import LocalComm

st = pytest.importorskip("safetensors.torch")
GROUP = {"ZEROLITE_SHARED": "0"}


class Odd(Net):
    """Buffers, frozen parts and other orders of memory beside."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.turned = nn.Parameter(torch.randn(7, 31).t())
        self.cold = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("count", torch.tensor([7]))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("lost", torch.ones(3), persistent=False)

    def forward(self, tokens):
        return super().forward(tokens) + self.conv.weight.sum() + self.conv.bias.sum() + self.turned.sum()


def train(model, optimizer, rank, first=0, count=2):
    for step in range(first, first + count):
        loss_of(model, tokens_for(step, 0, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()


def load(folder):
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return st.load_file(folder / "model.safetensors")
    names = json.loads(index.read_text())["weight_map"]
    found = {file: st.load_file(folder / file) for file in set(names.values())}
    return {name: found[file][name] for name, file in names.items()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_files_equal_the_state_dict(stage, dtype, tmp_path):
    file_bytes = 4_000 if stage % 2 else 5_000_000_000

    def body(comm):
        model, optimizer = make(Run(stage=stage, dtype=dtype, bucket_mb=1e-3), comm, seeded(Odd))
        train(model, optimizer, comm.rank)
        with optimizer.full_params():
            model.norm.weight[0] = 0.5  # a write of the script is in it
        zerolite.save_pretrained(model, tmp_path / "new", file_bytes=file_bytes)
        zerolite.save_pretrained(model, tmp_path / "exact", masters=True)
        return {k: v.clone() for k, v in model.state_dict().items()}, optimizer.full_state()

    (state, states), _ = on_threads(2, body)
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert (files == ["model.safetensors"]) == (file_bytes > 4_000) and not any(name.endswith(".new") for name in files)
    found = load(tmp_path / "new")
    assert found.keys() == state.keys() - {"head.weight"}  # tied to embed.weight
    assert all(equal(value, state[name].contiguous()) for name, value in found.items())
    exact = load(tmp_path / "exact")
    for name, value in exact.items():
        trained = name in states
        expected = states[name].get("master", state[name]) if trained else state[name]
        assert equal(value, expected.contiguous()), name
        assert not trained or value.dtype == torch.float32


def resumed(rank, stage, folder):
    model, optimizer = make(Run(stage=stage, dtype=torch.bfloat16), None)
    train(model, optimizer, rank)
    zerolite.save_pretrained(model, folder)
    part = optimizer.state_dict()
    train(model, optimizer, rank, 2)
    with zerolite.meta_init(init=False):
        other = Net()
    other, again = make(Run(stage=stage, dtype=torch.bfloat16), None, other)
    zerolite.load_pretrained(other, folder)
    again.load_state_dict(part)
    train(other, again, rank, 2)
    return equal(dict(model.state_dict()), dict(other.state_dict())) and equal(optimizer.full_state(), again.full_state())


@pytest.mark.parametrize("env", [{}, GROUP], ids=["shared", "gloo"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_is_resumed_without_a_whole_model_anywhere(env, stage, tmp_path):
    assert on_processes(2, resumed, stage, str(tmp_path), env=env) == [True, True]


def test_a_later_save_replaces_the_earlier_one_and_leaves_other_files(tmp_path):
    model, optimizer = make(Run(stage=2), LocalComm())
    (tmp_path / "config.json").write_text("{}")

    def save(**options):
        train(model, optimizer, 0)
        zerolite.save_pretrained(model, tmp_path, **options)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in load(tmp_path).items())
        return {path.name for path in tmp_path.iterdir()}

    index = {"config.json", "model.safetensors.index.json"}
    assert save() == {"config.json", "model.safetensors"} == save()
    first = save(file_bytes=6_000)
    second = save(file_bytes=6_000)
    assert first & second == index and len(first) == len(second) > 3 and save(file_bytes=6_000) == first
    assert save() == {"config.json", "model.safetensors"}


def test_a_full_disk_is_told_to_all_and_leaves_what_was_there(tmp_path, monkeypatch):
    def body(comm):
        model, optimizer = make(Run(stage=3), comm)
        zerolite.save_pretrained(model, tmp_path)
        before = load(tmp_path)
        train(model, optimizer, comm.rank)
        comm.share(None, "set-up")
        if comm.rank == 0:
            monkeypatch.setattr(saved.Files, "append", full)
        with pytest.raises(RuntimeError, match=r"rank 0 could not write to .*No space left"):
            zerolite.save_pretrained(model, tmp_path)
        return equal(before, load(tmp_path)), sorted(path.name for path in tmp_path.iterdir())

    append, calls = saved.Files.append, []

    def full(self, values):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        append(self, values)

    assert on_threads(2, body) == [(True, ["model.safetensors"])] * 2


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"save_pretrained: expected the model that .*save_file\(model\.state_dict"):
        zerolite.save_pretrained(nn.Linear(2, 2), tmp_path)
    model, optimizer = make(Run(stage=3), LocalComm())
    with optimizer.full_params(), pytest.raises(RuntimeError, match=r"outside of full_params"):
        zerolite.save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="file_bytes: expected at least 1, got 0"):
        zerolite.save_pretrained(model, tmp_path, file_bytes=0)
