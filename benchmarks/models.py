"""The models that are measured: GPT-2, Llama and Mixtral (MoE) shapes from transformers with random weights, and many
small parameters. Names carry the number of parameters; all are built in bf16 from one seed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

CONTEXT = 1024  # positions of a GPT-2
SMALL = 100  # parameters of one block of the model with many small ones


@dataclass(frozen=True)
class Shape:
    """A model without its weights."""

    kind: str  # "gpt2", "llama", "moe", "small"
    layers: int
    width: int
    heads: int
    words: int
    rows: int = 2  # a batch of one rank: rows x length tokens
    length: int = 64
    checkpoint: bool = False  # activations are computed again in the backward

    def build(self, seed: int = 0) -> nn.Module:
        """The model in bf16, with the same values on every rank."""
        torch.manual_seed(seed)
        if self.kind == "small":
            return Small(self.layers, self.width).to(torch.bfloat16)
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(self.config(), dtype=torch.bfloat16)
        if self.checkpoint:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def config(self) -> Any:
        """The transformers config; no dropout, so that losses can be compared."""
        from transformers import GPT2Config, LlamaConfig, MixtralConfig

        plain: dict[str, Any] = {"use_cache": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

        if self.kind == "gpt2":
            drop: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
            sizes: dict[str, Any] = {
                "n_layer": self.layers,
                "n_embd": self.width,
                "n_head": self.heads,
                "vocab_size": self.words,
            }
            return GPT2Config(**sizes, n_positions=CONTEXT, **plain, **drop)
        inner = -(-self.width * 8 // 3 // 32) * 32  # Llama's 8/3, in whole vectors
        sizes = {"num_hidden_layers": self.layers, "hidden_size": self.width, "intermediate_size": inner}
        sizes |= {"num_attention_heads": self.heads, "num_key_value_heads": self.heads // 2, "vocab_size": self.words}
        if self.kind == "llama":
            return LlamaConfig(**sizes, tie_word_embeddings=False, **plain)
        return MixtralConfig(**sizes, num_local_experts=8, num_experts_per_tok=2, **plain)

    @functools.cache  # noqa: B019 - shapes are few and live as long as the program
    def count(self) -> int:
        """Number of parameters, without building them."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.build().parameters())

    def batch(self, generator: torch.Generator) -> Tensor:
        """Token ids of one step: of a few words only, so that a loss falls within few steps."""
        return torch.randint(0, min(self.words, 256), (self.rows, self.length), generator=generator)

    @property
    def tokens(self) -> int:
        """Tokens of one rank's step."""
        return self.rows * self.length


class Block(nn.Module):
    """A hundred vectors: a low-rank step of a residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(width) * width**-0.5) for _ in range(SMALL)])

    def forward(self, x: Tensor) -> Tensor:
        matrix = torch.stack(list(self.weights))
        return x + torch.tanh(x @ matrix.T) @ matrix / SMALL


class Small(nn.Module):
    """`blocks` x 100 parameters of `width` elements; predicts the next token's random code."""

    codes: Tensor

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(256, width, generator=torch.Generator().manual_seed(0)))
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        x = self.codes[input_ids[:, :-1]]
        for block in self.blocks:
            x = block(x)
        return CausalLMOutput(loss=(x - self.codes[labels[:, 1:]]).float().square().mean())


MODELS: dict[str, Shape] = {
    "gpt2-5M": Shape("gpt2", 4, 256, 4, 8000),
    "gpt2-49M": Shape("gpt2", 8, 512, 8, 46000),
    "gpt2-124M": Shape("gpt2", 12, 768, 12, 50257),
    "llama-5M": Shape("llama", 4, 256, 4, 4000),
    "llama-56M": Shape("llama", 8, 512, 8, 32000),
    "llama-130M": Shape("llama", 12, 768, 12, 32000),
    "moe-22M": Shape("moe", 4, 256, 4, 8000),
    "small-10k": Shape("small", 100, 500, 1, 256),
}


#: For GPUs: a row of 8,192 tokens.
LARGE: dict[str, Shape] = {
    "llama-1.5B": Shape("llama", 24, 2048, 16, 32000, 1, 8192, checkpoint=True),
    "llama-7B": Shape("llama", 32, 4096, 32, 32000, 1, 8192, checkpoint=True),
}
KNOWN = {**MODELS, **LARGE}


def grown(layers: int, width: int, words: int = 8000, checkpoint: bool = False) -> Shape:
    """A GPT-2 shape of some depth: what the search for the largest model makes deeper."""
    heads = max(width // 64, 1)
    return replace(MODELS["gpt2-5M"], layers=layers, width=width, heads=heads, words=words, checkpoint=checkpoint)
