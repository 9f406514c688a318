"""Models without memory: from a name, a transformers config or a count, on the meta device; and what they save for backward."""

from __future__ import annotations

import copy
import difflib
import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_LLAMA = {"model_type": "llama", "tie_word_embeddings": False}

#: Values of transformers configs that size depends on, as published in each model's config.json.
NAMES: dict[str, dict[str, Any]] = {
    # huggingface.co/openai-community/gpt2, gpt2-medium, gpt2-large, gpt2-xl
    "gpt2": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25},
    # huggingface.co/meta-llama/Llama-2-7b-hf, Llama-2-13b-hf, Llama-2-70b-hf; Touvron et al. 2023
    "llama-2-7b": {**_LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
    "llama-2-13b": {
        **_LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "vocab_size": 32000,
    },
    "llama-2-70b": {
        **_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 32000,
    },
    # huggingface.co/meta-llama/Meta-Llama-3-8B, Meta-Llama-3-70B
    "llama-3-8b": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-3-70b": {
        **_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    # huggingface.co/mistralai/Mistral-7B-v0.1
    "mistral-7b": {
        "model_type": "mistral", "tie_word_embeddings": False, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    },
}  # fmt: skip

_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:E\+?[0-9]+)?"
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_MOST = 1e16  # parameters that a plan is made for
_COUNTS = {"": 0, "K": 3, "M": 6, "B": 9, "G": 9, "T": 12}


def parse_bytes(value: Any, name: str) -> int | None:
    """Bytes of a number or of text such as "80G" (1e9 each), "512GiB" (2^30 each), "1.5T". None stays None."""
    if value is None:
        return None
    match = re.fullmatch(rf"\s*({_NUMBER})\s*([KMGTP]?)(I?)B?\s*", str(value).upper())
    size = float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2]] if match is not None else 0.0
    if isinstance(value, bool) or not 1 <= size < math.inf:
        raise ValueError(f"{name}: expected a size such as '80G', '512GiB' or '1.5T', got {value!r}")
    return int(size)


def parse_count(value: Any) -> int:
    """A number of parameters: 7e9, "7e9", "7B", "350M"."""
    match = re.fullmatch(rf"\s*({_NUMBER})\s*([KMBGT]?)\s*", str(value).upper())
    count = float(match[1]) * 10 ** _COUNTS[match[2]] if match is not None else 0.0
    if isinstance(value, bool) or not 1 <= count < _MOST:
        raise ValueError(f"parameters: expected a count such as 7e9, '7B' or '350M', below {_MOST:g}, got {value!r}")
    return int(count)


class _Block(nn.Module):
    """A block of `Counted`: it stands for one that runs."""

    def forward(self, *_: Any) -> Any:
        raise NotImplementedError("a count of parameters cannot run")


class Counted(nn.Module):
    """`count` parameters in the proportions of a transformer: blocks of 4 + 8 parts, and a twentieth in the embedding."""

    def __init__(self, count: int) -> None:
        super().__init__()
        blocks = max(round(32 * (count / 7e9) ** (1 / 3)), 1)  # 32 blocks at 7e9; width and depth grow together
        part = count * 19 // 20 // (12 * blocks)
        self.embed = nn.Parameter(torch.empty(count - 12 * part * blocks, device="meta"))
        self.blocks = nn.ModuleList()
        for _ in range(blocks if part else 0):
            block = _Block()
            for number, parts in enumerate((1, 1, 1, 1, 4, 4)):
                block.register_parameter(f"weight_{number}", nn.Parameter(torch.empty(parts * part, device="meta")))
            self.blocks.append(block)


def model_of(source: Any) -> tuple[nn.Module, str]:
    """A model without memory and what it is: from a module (given back as it is), a config object, a name of NAMES, the
    path of a config.json (or of its folder), or a count.

    Raises ValueError for anything else, ImportError where a config needs transformers.
    """
    if isinstance(source, nn.Module):
        return source, type(source).__name__
    if hasattr(source, "model_type") and hasattr(source, "to_dict"):
        return from_config(source), f"{source.model_type} from a config"
    if isinstance(source, str) and source in NAMES:
        return from_config(_config(NAMES[source], source)), source
    path = Path(source) if isinstance(source, (str, Path)) else None
    if path is not None and path.exists():
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"model: expected a folder with a transformers config.json in it, got {str(source)!r} without one")
        try:
            values = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: expected the JSON of a transformers config, got {_first_line(error)}") from None
        return from_config(_config(values, str(path))), str(path)
    try:
        count = parse_count(source)
    except ValueError:
        near = difflib.get_close_matches(str(source), NAMES, 1)
        meant = f". Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"model: expected an nn.Module, a transformers config, the path of a config.json, a count such as 7e9, or one of "
            f"{', '.join(NAMES)}, got {source!r}{meant}"
        ) from None
    return Counted(count), f"{count:,} parameters, in the proportions of a transformer (a config gives exact units)"


def _config(values: Any, source: str) -> Any:
    transformers = _transformers(source)
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"{source}: expected a transformers config with a 'model_type', got {str(values)[:80]!r}")
    values = dict(values)
    try:
        return transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception as error:  # of whatever class its checks raise
        raise ValueError(f"{source}: expected values of a transformers config, got {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}"


def _transformers(source: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise ImportError(
            f"'{source}': expected transformers to build a model from its config, found none. pip install transformers, or "
            "plan from a count (--params 7e9) or a module."
        ) from None
    return transformers


def from_config(config: Any) -> nn.Module:
    """The causal language model of a config (else the plain model), on the meta device: shapes and no memory."""
    transformers = _transformers(str(config.model_type))
    kinds = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = transformers.AutoModelForCausalLM if type(config) in kinds else transformers.AutoModel
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return auto.from_config(config)
        except Exception as error:  # whatever values such as 0 heads make transformers or torch raise
            raise ValueError(
                f"config of '{config.model_type}': expected values that {auto.__name__} builds a model from, got "
                f"{_first_line(error)}"
            ) from error


def activations(model: nn.Module, batch: Any, dtype: torch.dtype | None) -> int:
    """Bytes that autograd saves for one backward of model(batch), parameters and inputs apart, without computing.

    batch  a tensor, a sequence of arguments or a mapping of keyword arguments; values do not matter. It runs on a copy on the
    meta device, where attention may take another kernel than on a GPU. Raises ValueError for a model that cannot run there.
    """
    if not _leaves(batch):
        raise ValueError(
            f"batch: expected tensors that the model's forward takes, got {batch!r:.80}. Of a shape: "
            "torch.empty(4, 1024, dtype=torch.int64, device='meta')."
        )
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        return _saved(model, batch, dtype)


def _saved(model: nn.Module, batch: Any, dtype: torch.dtype | None) -> int:
    memo: dict[int, Any] = {}
    for p in model.parameters():
        own = dtype if dtype is not None and p.dtype == torch.float32 else p.dtype
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta", dtype=own), p.requires_grad)
    memo.update({id(b): torch.empty_like(b, device="meta") for b in model.buffers()})
    ghost = copy.deepcopy(model, memo)
    ours = {p.untyped_storage()._cdata for p in ghost.parameters()}
    saved: dict[int, Tensor] = {}  # kept, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in ours:
            saved[t.untyped_storage()._cdata] = t
        return t

    batch = _to_meta(batch)
    ours |= {t.untyped_storage()._cdata for t in _leaves(batch)}
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            if isinstance(batch, Mapping):
                result = ghost(**batch)
            else:
                result = ghost(*batch) if isinstance(batch, (tuple, list)) else ghost(batch)
    except Exception as error:  # of whatever class a forward raises
        raise ValueError(
            f"batch: expected {type(model).__name__} to run on the meta device, got {_first_line(error)}. Plan without a batch "
            "and add what you measured."
        ) from error
    del result
    return sum(t.untyped_storage().nbytes() for t in saved.values())


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, Mapping):
        return {key: _to_meta(item) for key, item in value.items()}
    return type(value)(_to_meta(item) for item in value) if isinstance(value, (tuple, list)) else value


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else []
    return [leaf for item in items for leaf in _leaves(item)]
