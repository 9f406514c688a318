"""Real models: transformers' GPT-2 and Llama, torch.compile, generation."""

from __future__ import annotations

import pytest
import torch
from models import Net, Run, equal, loss_of, make, seeded, tokens_for
from ranks import on_threads
from torch import nn

import zerolite
from zerolite.comm.local import LocalComm

transformers = pytest.importorskip("transformers")


def gpt2(layers=3):
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=24, n_head=2, vocab_size=97, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


def llama(layers=3):
    config = transformers.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=97,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def mixtral():
    config = transformers.MixtralConfig(
        num_hidden_layers=2,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=97,
        num_local_experts=4,
        num_experts_per_tok=1,
        max_position_embeddings=32,
    )
    return transformers.MixtralForCausalLM(config)


def train(comm, make_model, stage, dtype=torch.bfloat16, checkpointing=None, micro=1, steps=3):
    model = seeded(make_model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = zerolite.ZeroOptimizer(optimizer, model, stage=stage, param_dtype=dtype, process_group=comm)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    losses = []
    for step in range(steps):
        for k in range(micro):
            tokens = tokens_for(step, k, comm.rank, words=97)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("make_model", [gpt2, llama, mixtral])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_same_bits_at_every_stage(make_model, checkpointing):
    expected = on_threads(2, train, make_model, 0, torch.bfloat16, checkpointing, 2)
    for stage in (1, 2, 3):
        assert equal(on_threads(2, train, make_model, stage, torch.bfloat16, checkpointing, 2), expected), stage
    if checkpointing is not None and make_model is not mixtral:
        plain = on_threads(2, train, make_model, 3, torch.bfloat16, None, 2)
        if not checkpointing:
            assert equal(plain, expected)  # recomputing changes no bit


def test_generate_inside_full_params_at_stage_3():
    def tokens(stage):
        model = seeded(gpt2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        optimizer = zerolite.ZeroOptimizer(optimizer, model, stage=stage, process_group=LocalComm())
        prompt = tokens_for(0, 0, 0, words=97)[:1]
        model(input_ids=prompt, labels=prompt).loss.backward()
        optimizer.step()
        model.eval()
        with optimizer.full_params():
            inside = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
        outside = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(inside, outside)
        return inside

    assert torch.equal(tokens(2), tokens(3))


def compiled_losses(stage, compile_model):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # else frames of other tests of this process count
    model = seeded(Net)
    if compile_model and stage == 3:
        for number, block in enumerate(model.blocks):
            model.blocks[number] = torch.compile(block, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = zerolite.ZeroOptimizer(optimizer, model, stage=stage, process_group=LocalComm())
    forward = torch.compile(model, backend="aot_eager") if compile_model and stage < 3 else model
    losses = []
    for step in range(4):
        for k in range(2):
            loss = loss_of(forward, tokens_for(step, k, 0))
            loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    frames = sum(torch._dynamo.utils.counters["frames"].values())
    return losses, frames


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_compile(stage):
    expected, _ = compiled_losses(stage, False)
    losses, frames = compiled_losses(stage, True)
    assert losses == pytest.approx(expected, abs=1e-5)
    assert 0 < frames <= 24  # no recompilation at every step: 4 steps x 2 micro-batches x (1 model or 3 blocks) if there were


@pytest.mark.parametrize("stage", [2, 3])
def test_compile_in_place(stage):
    torch._dynamo.reset()
    model = seeded(Net)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    _, optimizer = make(Run(stage=stage), LocalComm(), model)
    losses = []
    for step in range(3):
        loss = loss_of(model, tokens_for(step, 0, 0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    plain, plain_optimizer = make(Run(stage=stage), LocalComm())
    for step in range(3):
        loss = loss_of(plain, tokens_for(step, 0, 0))
        loss.backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        assert losses[step] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_functional_transforms(stage):
    model, optimizer = make(Run(stage=stage), LocalComm())
    with optimizer.full_params():
        params = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = tokens_for(0, 0, 0)

    def loss(values):
        logits = torch.func.functional_call(model, values, (tokens[:, :-1],))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    if stage == 3:
        with pytest.raises(RuntimeError, match=r"torch.func's transforms.*full_params\(\)"):
            torch.func.grad(loss)(params)
    with optimizer.full_params():
        grads = torch.func.grad(loss)(params)
    loss_of(model, tokens).backward()
    for name, value in optimizer.full_grads().items():
        torch.testing.assert_close(value, grads[name])


def test_hooks_can_be_removed():
    model, optimizer = make(Run(stage=2), LocalComm())
    optimizer.remove_hooks()
    loss_of(model, tokens_for(0, 0, 0)).backward()
    assert type(model.norm.weight.grad) is torch.Tensor


class Routed(nn.Module):
    """A block that keeps a loss of its own as an attribute, as mixtures of experts do."""

    def __init__(self):
        super().__init__()
        self.norm, self.router, self.mix = nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(6, 6)
        self.aux = None

    def forward(self, x):
        weights = self.router(torch.tanh(self.norm(x)))
        self.aux = weights.logsumexp(-1).square().mean()
        return x + self.mix(x) * weights.softmax(-1).amax(-1, keepdim=True)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(6, 6), nn.ModuleList(Routed() for _ in range(3)), nn.Linear(6, 1)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x).square().mean()


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("between", [False, True])
def test_losses_that_blocks_keep_have_a_backward_of_their_own(stage, world, between):
    """No gradient enters such a block through its outputs; a forward in between has released what was whole."""

    def loop(model, optimizer, ranks):
        for step in range(3):
            batches = [torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank)) for rank in ranks]
            for x in batches:
                (model(x) / len(ranks)).backward(retain_graph=True)
                aux = [block.aux for block in model.blocks]
                if between:
                    with torch.no_grad():
                        model(x)
                (0.1 * sum(aux) / len(ranks)).backward()
            optimizer.step()
            optimizer.zero_grad()

    def body(comm):
        model = seeded(Stack)
        optimizer = zerolite.ZeroOptimizer(
            torch.optim.AdamW(model.parameters(), lr=1e-2), model, stage=stage, process_group=comm
        )
        loop(model, optimizer, [comm.rank])
        return {name: value.clone() for name, value in model.state_dict().items()}, optimizer.skipped_steps

    model = seeded(Stack)
    loop(model, torch.optim.AdamW(model.parameters(), lr=1e-2), range(world))
    for found, skipped in on_threads(world, body):
        assert skipped == 0
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("world", [1, 2])
def test_parameters_are_whole_when_stage_3_has_gone(world):
    def body(comm):
        model, optimizer = make(Run(stage=3), comm)
        loss_of(model, tokens_for(0, 0, comm.rank)).backward()
        optimizer.step()
        before = model.state_dict()
        with pytest.raises(RuntimeError, match=r"remove_hooks\(\): expected outside"), optimizer.full_params():
            optimizer.remove_hooks()
        optimizer.remove_hooks()
        optimizer.remove_hooks()
        after = {name: value.clone() for name, value in model.state_dict().items()}
        again = zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage=3, process_group=comm)
        loss_of(model, tokens_for(1, 0, comm.rank)).backward()
        again.step()
        return before, after, all(bool(value.isfinite().all()) for value in model.state_dict().values())

    for before, after, trained in on_threads(world, body):
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before) and trained


@pytest.mark.parametrize("make_model", [gpt2, llama])
def test_a_cache_does_not_keep_blocks_whole(make_model):
    """A key cache, which training has by default, hands every block the keys of the blocks before it."""
    model = seeded(lambda: make_model(6))
    optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW(model.parameters()), model, stage=3, process_group=LocalComm())
    tokens = torch.randint(0, 97, (2, 8))
    counts: list[int] = []

    def count(event, name):
        units = {bucket.name.rsplit(" ", 1)[0] for bucket in optimizer._parts.buckets if bucket.whole}
        counts.append(len(units - {"root"}))

    for _ in range(2):  # the first forward teaches the order
        loss = model(input_ids=tokens, labels=tokens, use_cache=True).loss
        optimizer._parts.comm.ledger.listener = count
        loss.backward()
        optimizer._parts.comm.ledger.listener = None
        optimizer.step()
        optimizer.zero_grad()
    assert max(counts) == 2  # of six: the block in use and the one that is prefetched
