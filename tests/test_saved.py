"""save_pretrained: files that everyone reads, of every stage, that a kill or a full disk cannot spoil."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from models import Net, Run, equal, loss_of, make, seeded, tokens_for
from ranks import GROUP, on_processes, on_threads
from torch import nn

import zerolite
from zerolite import saved
from zerolite.bucket import Bucket
from zerolite.comm.ledger import RankError
from zerolite.comm.local import LocalComm
from zerolite.safetensors import open_files

st = pytest.importorskip("safetensors.torch")


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


@pytest.mark.parametrize("before", [5_000_000_000, 6_000])
@pytest.mark.parametrize("after", [5_000_000_000, 6_000])
@pytest.mark.parametrize("first", ["index", "single"])
def test_whenever_it_is_killed_readers_find_the_old_files_or_the_new(before, after, first, tmp_path, monkeypatch):
    model, optimizer = make(Run(stage=2), LocalComm())
    values = []

    def here():
        if first == "index":
            found = {name: stored.read(0, stored.numel).view(stored.shape) for name, stored in open_files(tmp_path).items()}
        else:
            single = tmp_path / "model.safetensors"
            found = st.load_file(single) if single.exists() else load(tmp_path)
        assert len(found) == len(dict(model.named_parameters()))
        return [equal(found, {name: value[name] for name in found}) for value in values]

    def save(file_bytes):
        train(model, optimizer, 0)
        values.append({name: value.clone() for name, value in model.state_dict().items()})
        zerolite.save_pretrained(model, tmp_path, file_bytes=file_bytes)
        assert here().index(True) == len(values) - 1

    save(before)
    moments = []
    for name in ("replace", "unlink"):
        call = getattr(Path, name)
        monkeypatch.setattr(Path, name, lambda *args, call=call, **more: (call(*args, **more), moments.append(here())))
    save(after)
    assert all(sum(moment) == 1 for moment in moments) and moments == sorted(moments, reverse=True)
    assert moments[-1] == [False, True]


@pytest.mark.parametrize("file_bytes", [5_000_000_000, 6_000])
@pytest.mark.parametrize("place", ["append", "_finish", "write_text", "replace", "dtype"])
def test_what_fails_is_told_to_all_and_leaves_what_was_there(place, file_bytes, tmp_path, monkeypatch):
    def body(comm):
        model, optimizer = make(Run(stage=3), comm, seeded(Net))
        zerolite.save_pretrained(model, tmp_path, file_bytes=6_000)
        names, before = {path.name for path in tmp_path.iterdir()}, load(tmp_path)
        train(model, optimizer, comm.rank)
        comm.share(None, "set-up")
        if comm.rank == 0 and place == "dtype":
            model.register_buffer("odd", torch.zeros(1, dtype=torch.complex128))
        elif comm.rank == 0:
            owner = saved.Files if place in ("append", "_finish") else Path
            call, calls = getattr(owner, place), []
            last = 1 if place == "write_text" or (place == "replace" and file_bytes > 6_000) else 2

            def fails(*args, **more):
                calls.append(1)
                if len(calls) == last:
                    raise ValueError("of any kind")
                return call(*args, **more)

            monkeypatch.setattr(owner, place, fails)
        with pytest.raises(RuntimeError, match="rank 0 could not write to"):
            zerolite.save_pretrained(model, tmp_path, file_bytes=file_bytes)
        monkeypatch.undo() if comm.rank == 0 else None
        comm.share(None, "set-up")
        return equal(before, load(tmp_path)), names == {path.name for path in tmp_path.iterdir()}

    if place == "write_text" and file_bytes > 6_000:
        pytest.skip("one file has no index")
    assert on_threads(2, body) == [(True, True)] * 2


def test_an_index_that_is_not_json_is_replaced(tmp_path):
    model, _ = make(Run(stage=2), LocalComm())
    (tmp_path / "config.json").write_text("{}")
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "config.json"}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        zerolite.save_pretrained(model, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_an_earlier_file_that_stays_is_told(tmp_path, monkeypatch):
    model, _ = make(Run(stage=2), LocalComm())
    zerolite.save_pretrained(model, tmp_path)

    def denied(self, missing_ok=False):
        raise PermissionError("no access")

    monkeypatch.setattr(Path, "unlink", denied)
    with pytest.raises(RuntimeError, match=r"no access\); the new files are in place, earlier ones could not be removed"):
        zerolite.save_pretrained(model, tmp_path, file_bytes=6_000)
    assert len({stored.path for stored in open_files(tmp_path).values()}) > 1


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"save_pretrained: expected the model that .*save_file\(model\.state_dict"):
        zerolite.save_pretrained(nn.Linear(2, 2), tmp_path)
    model, optimizer = make(Run(stage=3), LocalComm())
    with optimizer.full_params(), pytest.raises(RuntimeError, match=r"outside of full_params"):
        zerolite.save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="file_bytes: expected a whole number, at least 1, got 0"):
        zerolite.save_pretrained(model, tmp_path, file_bytes=0)


def test_what_one_rank_cannot_save_is_told_to_all_before_anything_is_written(tmp_path):
    def body(comm):
        model, _ = make(Run(stage=2), comm)
        if comm.rank == 1:
            model.norm.weight.data = model.norm.weight.detach().clone()
        words = "its storage was replaced"
        with pytest.raises(
            RuntimeError, match=words if comm.rank == 1 else rf"rank 1 could not begin save_pretrained: .*{words}"
        ):
            zerolite.save_pretrained(model, tmp_path)
        with pytest.raises((ValueError, RuntimeError), match="file_bytes: expected a whole number, at least 1, got 0"):
            zerolite.save_pretrained(make(Run(stage=2), comm)[0], tmp_path, file_bytes=comm.rank)
        with pytest.raises(ValueError, match="expected the same `masters` on every rank, got another on rank 1 than on rank 0"):
            zerolite.save_pretrained(make(Run(stage=2), comm)[0], tmp_path, masters=comm.rank == 1)

    on_threads(2, body)
    assert not list(tmp_path.iterdir())


def test_two_saves_into_one_folder_do_not_mix(tmp_path):
    model, _ = make(Run(stage=2), LocalComm())
    other = saved._lock(tmp_path)  # as another process would hold it
    with pytest.raises(RuntimeError, match=r"another save to .* is under way"):
        zerolite.save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())
    saved.os.close(other)
    for _ in range(2):  # and each gives it back
        zerolite.save_pretrained(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_files_go_on_where_a_folder_cannot_be_locked(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(saved.fcntl, "flock", refused)
    zerolite.save_pretrained(make(Run(stage=2), LocalComm())[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_save_that_loses_a_rank_takes_away_what_it_began(tmp_path, monkeypatch):
    model, _ = make(Run(stage=3, bucket_mb=1e-6), LocalComm())
    collect, calls = Bucket.collect_whole, []

    def lost(self, *args):
        calls.append(self)
        if len(calls) == 4:
            raise RankError("rank 1 is lost")
        return collect(self, *args)

    with monkeypatch.context() as patch, pytest.raises(RankError, match="rank 1 is lost"):
        patch.setattr(Bucket, "collect_whole", lost)
        zerolite.save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())
    zerolite.save_pretrained(model, tmp_path)  # nor is the folder held


def test_a_folder_that_cannot_be_looked_at_is_not_kept_locked(tmp_path, monkeypatch):
    items = [saved.Item(f"p{k}", torch.float32, torch.Size([4])) for k in range(2)]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "exists", lambda self: (_ for _ in ()).throw(PermissionError("no")))
        with pytest.raises(PermissionError):
            saved.Files(tmp_path, items, 16)
    saved.Files(tmp_path, items, 16).unlock()


@pytest.mark.parametrize("stage", [2, 3])
def test_buffers_that_repeat_memory_or_are_lazily_conjugate_come_back(tmp_path, stage):
    model = nn.Linear(3, 3)
    model.register_buffer("one", torch.full((1,), 2.0).expand(4))
    model.register_buffer("conjugate", torch.tensor([1 + 2j, 3j]).conj())
    model.register_buffer("negative", torch.tensor([1 + 2j, 3j]).conj().imag)
    expected = {name: value.clone() for name, value in model.named_buffers()}

    def save(comm):
        other = copy.deepcopy(model)
        optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW(other.parameters()), other, stage=stage, process_group=comm)
        zerolite.save_pretrained(other, tmp_path)
        for value in other.buffers():
            value[:1].fill_(7)
        zerolite.load_pretrained(other, tmp_path)
        del optimizer
        return {name: value.clone() for name, value in other.named_buffers()}

    for found in on_threads(2, save):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
