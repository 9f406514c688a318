"""Models that begin on the meta device, and values streamed from safetensors files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from models import Net, Run, equal, loss_of, make, seeded, tokens_for
from ranks import GROUP, on_processes, on_threads
from torch import nn

import zerolite
from zerolite.safetensors import DTYPES, open_files

safetensors = pytest.importorskip("safetensors")
st = pytest.importorskip("safetensors.torch")


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


@pytest.mark.parametrize("size,stage,env", [(2, 3, {}), (3, 3, GROUP), (2, 2, {})])
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


class Masked(nn.Module):
    """Buffers of which every value is plausible."""

    def __init__(self, fills=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("codes", torch.zeros(3, dtype=torch.uint8))
        self.register_buffer("angles", torch.zeros(3, dtype=torch.complex64))
        self.fills = fills

    def reset_parameters(self):
        nn.init.ones_(self.weight)
        self.mask.copy_(torch.tensor([True, False, True]))
        self.codes.zero_()
        if self.fills:
            self.angles.fill_(1j)


class Forgetful(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.extra = nn.Parameter(torch.ones(2, 2))


def build(model, **options):
    return zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, **{"stage": 3, **options})


def test_buffers_of_every_dtype_are_woken():
    with torch.device("meta"):
        model = nn.Sequential(Masked())
    build(model)
    assert model[0].mask.tolist() == [True, False, True] and model[0].codes.tolist() == [0, 0, 0]
    assert model[0].angles.tolist() == [1j, 1j, 1j]
    with torch.device("meta"):
        model = nn.Sequential(Masked(fills=False))
    with pytest.raises(ValueError, match=r"buffer '0\.angles'"):
        build(model)


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


class Shifted(nn.Module):
    """A vector of the parent, which keeps its values, and which a child has too."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.arange(4.0))
        self.inner = nn.Linear(4, 4)
        self.inner.bias = self.shift


def test_a_vector_that_stays_and_a_child_share_one_parameter():
    for stage in (2, 3):
        model = on_meta(Shifted)
        assert model.inner.bias is model.shift and not model.shift.is_meta
        build(model, stage=stage)
        assert torch.equal(model.state_dict()["inner.bias"], torch.arange(4.0))


def test_a_recipe_of_rank_0_alone_fills_all_ranks():
    def body(comm, left_out):
        def fill(module):
            if comm.rank == left_out:
                nn.init.constant_(module.table, 3.0)

        model = on_meta(Bare, init=fill)
        if left_out == 1:  # rank 0 does not fill it: all ranks say so
            with pytest.raises(ValueError, match=r"'table'.*elements that it left out"):
                build(model, process_group=comm)
            return None
        build(model, process_group=comm)
        return model.state_dict()["table"]

    assert all(torch.equal(table, torch.full((4, 4), 3.0)) for table in on_threads(2, body, 0))
    assert on_threads(2, body, 1) == [None, None]


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


@pytest.mark.parametrize("stage,dtype", [(0, None), (1, torch.bfloat16), (2, torch.float16), (3, None), (3, torch.bfloat16)])
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


def llama(tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    )


MODELS = {"llama": llama, "llama tied": lambda: llama(True), "gpt2": gpt2}


def train_transformer(rank, model):
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = zerolite.ZeroOptimizer(inner, model, stage=3, param_dtype=torch.bfloat16)
    return optimizer, lambda: transformer_steps(rank, model, optimizer)


def transformer_steps(rank, model, optimizer):
    for step in range(2):
        model(input_ids=tokens_for(step, 0, rank), labels=tokens_for(step, 0, rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {k: v.clone() for k, v in model.state_dict().items()}, optimizer.full_state()


def load_transformers(rank, path):
    """For each model: eager from_pretrained against a meta model that is filled from the same directory."""
    found = []
    for name, build in MODELS.items():
        eager = seeded(build, 3)
        if rank == 0:
            eager.save_pretrained(path / name, max_shard_size="8KB")
        torch.distributed.barrier()
        eager = type(eager).from_pretrained(path / name, dtype=torch.float32)
        _, train = train_transformer(rank, eager)
        first = train()
        model = on_meta(build)  # initialised by transformers' own _init_weights, then loaded
        optimizer, train = train_transformer(rank, model)
        with optimizer.full_params():
            finite = all(bool(p.isfinite().all()) for p in model.parameters())
            spread = model.get_input_embeddings().weight.float().std().item()
        zerolite.load_pretrained(model, path / name)
        found.append(
            (name, len(list((path / name).glob("*.safetensors"))) > 1, finite, 0.015 < spread < 0.025, equal(first, train()))
        )
    return found


@pytest.mark.filterwarnings("ignore")
def test_transformers_models_from_sharded_directories(tmp_path):
    pytest.importorskip("transformers")
    expected = [(name, True, True, True, True) for name in MODELS]
    assert on_processes(2, load_transformers, tmp_path, timeout=60) == [expected] * 2


@pytest.mark.filterwarnings("ignore")
def test_a_transformers_model_under_torch_device_meta():
    pytest.importorskip("transformers")
    with torch.device("meta"):
        model = llama()
    eager = seeded(llama)
    build(model)
    angles = dict(eager.named_buffers())
    assert angles and all(torch.equal(buffer, angles[name]) for name, buffer in model.named_buffers())


# ---- what does not fit


def test_names_shapes_and_dtypes_that_do_not_fit(tmp_path):
    path, state = save_net(tmp_path)
    model = on_meta(Net, init=False)
    build(model)
    cases = [
        ({"norm.bias": None}, r"1 expected, and not in the files: norm\.bias\."),
        ({"wild": torch.ones(2)}, r"1 in the files, and not expected: wild\."),
        ({"norm.bias": torch.ones(2)}, r"'norm\.bias': expected shape \(13,\), got \(2,\)"),
        ({"norm.bias": torch.ones(13, dtype=torch.int32)}, r"'norm\.bias': expected values for torch\.float32, got I32"),
    ]
    for change, text in cases:
        st.save_file({k: v for k, v in {**state, **change}.items() if v is not None}, path)
        with pytest.raises(ValueError, match=text + r".*strict=False"):
            zerolite.load_pretrained(model, path)
        assert model.state_dict()["norm.weight"].isnan().all()  # nothing was written
    st.save_file({"wild": torch.ones(2), "norm.weight": state["norm.weight"]}, path)
    missing, unexpected = zerolite.load_pretrained(model, path, strict=False)
    assert unexpected == ["wild"] and "norm.bias" in missing and "norm.weight" not in missing
    assert torch.equal(model.state_dict()["norm.weight"], state["norm.weight"])
    assert model.state_dict()["norm.bias"].isnan().all()


def test_renamed_tensors_and_several_files(tmp_path):
    _, state = save_net(tmp_path)
    names = list(state)
    st.save_file({f"net.{k}": state[k] for k in names[::2]}, tmp_path / "a.safetensors")
    st.save_file({f"net.{k}": state[k] for k in names[1::2]}, tmp_path / "b.safetensors")
    model = on_meta(Net, init=False)
    build(model)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    zerolite.load_pretrained(model, files, rename=lambda name: f"net.{name}")
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in names)
    with pytest.raises(ValueError, match=r"b\.safetensors: tensor '.*' is in .* too"):
        zerolite.load_pretrained(model, [*files, files[1]])


def test_files_that_are_damaged_or_something_else(tmp_path):
    path, _ = save_net(tmp_path)
    model = seeded(Net)
    with pytest.raises(ValueError, match=r"expected the model that a ZeroOptimizer was built with"):
        zerolite.load_pretrained(model, path)
    optimizer = build(model)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        zerolite.load_pretrained(model, path)
    path.write_bytes(b"PK\x03\x04 a zip file")
    with pytest.raises(ValueError, match=r"expected a safetensors file, got what torch\.save writes: save its tensors with"):
        zerolite.load_pretrained(model, path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"expected a safetensors file, got a header of \d+ bytes in a file of 14"):
        zerolite.load_pretrained(model, path)
    with pytest.raises(FileNotFoundError, match="expected a safetensors file, or a folder of them, got a path where nothing"):
        zerolite.load_pretrained(model, tmp_path / "elsewhere")
    path.write_bytes(struct.pack("<Q", 4) + b"{{{{")
    with pytest.raises(ValueError, match="no JSON that can be read"):
        zerolite.load_pretrained(model, path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors\.index\.json or"):
        zerolite.load_pretrained(model, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere"}}))
    with pytest.raises(ValueError, match="names of files beside it"):
        zerolite.load_pretrained(model, tmp_path)
    with optimizer.full_params(), pytest.raises(RuntimeError, match="outside of full_params"):
        zerolite.load_pretrained(model, path)


WHOLE = "dtype, a shape and data_offsets"
HEADERS = {
    "a list": ("[]", "a JSON object, got list"),
    "a number": ("3", "a JSON object, got int"),
    "deep": ("[" * 200_000, "no JSON that can be read"),
    "twice": ('{"b": %(b)s, "b": %(b)s}', "a name comes twice"),
    "no entry": ('{"b": 5}', WHOLE),
    "no shape": ('{"b": {"dtype": "F32", "data_offsets": [0, 16]}}', WHOLE),
    "a float": ('{"b": {"dtype": "F32", "shape": [4], "data_offsets": [0.0, 16.0]}}', WHOLE),
    "a shape of floats": ('{"b": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}', WHOLE),
    "a text": ('{"b": {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}}', WHOLE),
    "a dtype": ('{"b": {"dtype": [1], "shape": [4], "data_offsets": [0, 16]}}', WHOLE),
    "negative": ('{"b": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}', WHOLE),
    "backwards": ('{"b": {"dtype": "X", "shape": [4], "data_offsets": [16, 0]}}', WHOLE),
    "too many": ('{"b": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]}}', "damaged or incomplete"),
    "overlapping": ('{"a": %(b)s, "b": %(b)s}', "no gap, and nothing twice"),
    "a gap": ('{"b": {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}}', "no gap, and nothing twice"),
}
INDEXES = {
    "{}": "a 'weight_map'",
    "[]": "a JSON object, got list",
    "{": "no JSON that can be read",
    '{"weight_map": {"a": 5}}': "names of files beside it, got 5",
    '{"weight_map": {"a": ".."}}': r"names of files beside it, got '\.\.'",
    '{"weight_map": {"a": ""}}': "names of files beside it, got ''",
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_are_not_what_the_format_says(what, tmp_path):
    """From strangers' files: a ValueError that names the file, before anything is written."""
    text, message = HEADERS[what]
    text = text.replace("%(b)s", '{"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}').encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
        open_files(tmp_path)
    if what != "twice":
        with pytest.raises(safetensors.SafetensorError):  # the format's own reader takes none of the others either
            st.load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("text", INDEXES)
def test_indexes_that_are_not_what_the_format_says(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=rf"index\.json: .*{INDEXES[text]}"):
        open_files(tmp_path)


class Kinds(nn.Module):
    """Buffers of every dtype that files have."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5))
        for kind, dtype in DTYPES.items():
            self.register_buffer(kind.lower(), torch.arange(1, 4).to(torch.float32).to(dtype))


def test_every_dtype_goes_through_files(tmp_path):
    model = Kinds()
    build(model)
    zerolite.save_pretrained(model, tmp_path)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    theirs = st.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(bits(theirs[name]), bits(value)) for name, value in state.items()) and len(theirs) == len(state)
    for buffer in model.buffers():
        buffer.zero_()
    zerolite.load_pretrained(model, tmp_path)
    assert all(torch.equal(bits(value), bits(state[name])) for name, value in model.state_dict().items())
    model.c64 = torch.zeros(3)
    with pytest.raises(ValueError, match=r"'c64': expected values for torch\.float32, got C64"):
        zerolite.load_pretrained(model, tmp_path)


def bits(value):
    return value.contiguous().view(torch.uint8)


def differ(rank, path, what):
    model, _ = make(Run(stage=3), None, on_meta(Net, init=False))
    own = path / str(rank)
    own.mkdir()
    file, state = save_net(own)
    if rank == 1 and what == "files":
        st.save_file({k: v.bfloat16() for k, v in state.items()}, file)
    if rank == 1 and what == "missing":
        file.unlink()
    try:
        zerolite.load_pretrained(model, file)
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        return str(error)


@pytest.mark.parametrize("what,text", [("files", "other names, dtypes or shapes on rank 1"), ("missing", "model.safetensors")])
def test_ranks_that_see_different_files(what, text, tmp_path):
    first, second = on_processes(2, differ, tmp_path, what)
    assert text in first and text in second
    assert what == "files" or "rank 1 could not load" in first


def load_at_any_time(rank, path):
    """Rank 1 comes half a second late, after a forward with the old values; steps follow on both."""
    import time

    model, optimizer = make(Run(stage=3, dtype=torch.bfloat16), None)
    steps(model, optimizer, rank)
    time.sleep(0.5 * rank)
    with torch.no_grad():
        before = loss_of(model, tokens_for(0, 0, 0)).item()
    zerolite.load_pretrained(model, path)
    with torch.no_grad():
        after = loss_of(model, tokens_for(0, 0, 0)).item()
    return before, after, *steps(model, optimizer, rank)


def test_a_rank_that_is_late_never_computes_with_half_a_file(tmp_path):
    path, _ = save_net(tmp_path)
    first, second = on_processes(2, load_at_any_time, path)
    assert equal(first, second) and first[0] != first[1]


# ---- memory

BLOCKS, WIDTH, MB = 48, 1024, 2**20


class Tower(nn.Module):
    """48 Mi parameters in units of 1 Mi: 192 MiB in fp32 alone, 768 MiB with gradients and Adam's moments."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def limit_data(extra):
    """This process may have `extra` MiB more of private memory than it has now.

    Tensors get mappings of their own, so that the limit counts them and not the holes that they leave in the heap.
    """
    import ctypes
    import resource

    assert ctypes.CDLL(None).mallopt(-3, 1 << 17) == 1  # M_MMAP_THRESHOLD
    lines = Path("/proc/self/status").read_text().splitlines()
    now = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + extra * MB, now + extra * MB))


def eager_under_a_limit(rank, extra):
    limit_data(extra)
    try:
        Tower()
    except RuntimeError as error:
        return str(error)


def under_a_limit(rank, path, extra):
    warm = make(Run(stage=3, dtype=torch.bfloat16, moments="int8"), None)
    steps(*warm, rank)  # code that torch imports at a first step is not the model's memory
    limit_data(extra)
    model = on_meta(Tower)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    optimizer = zerolite.ZeroOptimizer(inner, model, stage=3, param_dtype=torch.bfloat16, moments="int8")
    x = torch.ones(2, WIDTH, dtype=torch.bfloat16)
    with torch.no_grad():
        begun = bool(model(x).isfinite().all())
    zerolite.load_pretrained(model, path)
    with torch.no_grad():
        loaded = model(x).unique().tolist()
    for _ in range(2):
        model(x).float().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    zerolite.save_pretrained(model, path / "saved", file_bytes=8 * MB)
    with torch.no_grad():
        trained = model(x)
    zerolite.load_pretrained(model, path / "saved")
    with torch.no_grad():
        assert torch.equal(model(x), trained)
        return begun, loaded, trained.float().mean().item()


@pytest.mark.parametrize("env,extra", [(GROUP, 145), ({}, 186)], ids=["gloo", "shared"])
def test_a_model_beyond_the_limit_of_each_process(env, extra, tmp_path):
    x = torch.ones((), dtype=torch.bfloat16)
    for k in range(BLOCKS):
        weight = 1 + k % 4 / 64
        st.save_file({f"blocks.{k}.weight": torch.eye(WIDTH) * weight}, tmp_path / f"{k}.safetensors")
        x = x * weight
    assert "can't allocate memory" in on_processes(1, eager_under_a_limit, extra)[0]
    for found in on_processes(4, under_a_limit, tmp_path, extra, env=env, timeout=60):
        begun, loaded, trained = found
        assert begun and loaded == [x.item()] and trained < x.item()
