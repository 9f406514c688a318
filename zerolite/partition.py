"""Which parameters travel together: units of a model, and the checks that every parameter passes.

A *unit* is gathered and released as one where parameters rest sharded. By default each child of an
outermost ModuleList or Sequential is a unit (the blocks of a transformer), and what remains is the root. By default a
*leaf*, an embedding or a head that more than fills a bucket, is a unit too, as long as nobody reads its parameters outside
of its forward (unit.py). Other modules of the root may be used on some ranks only, so no rank may have to gather them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zerolite.layout import Layout, cut, group

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class UnitSpec:
    """A module and the parameters that are gathered with it (root: module=None takes the rest)."""

    name: str
    module: nn.Module | None
    params: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    leaf: bool = False


def find_units(
    model: nn.Module, classes: Iterable[type[nn.Module]] | None, limit: float = float("inf"), dtype: torch.dtype | None = None
) -> list[UnitSpec]:
    """Root first, then the units in the order of the module tree, each parameter in one of them.

    A parameter that two units use (tied weights) belongs to the root, which stays gathered while they run. `limit` and
    `dtype` are those of `cut_buckets`: a leaf is larger. Where there is one, there is a root for it to join, perhaps empty.
    With `classes` there is none: they alone are units.
    Raises TypeError where `classes` holds something else than module classes, ValueError where none occurs.
    """
    chosen = tuple(classes) if isinstance(classes, Iterable) else None
    if classes is not None and not (chosen and all(isinstance(c, type) and issubclass(c, nn.Module) for c in chosen)):
        raise TypeError(f"units: expected a list of nn.Module classes such as [TransformerBlock], got {classes!r}")
    uses = Counter(p for _, p in model.named_parameters(remove_duplicate=False))
    tables = {module.weight.shape for module in model.modules() if isinstance(module, nn.Embedding)}
    units: list[UnitSpec] = []

    def walk(module: nn.Module, name: str) -> None:
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            listed = isinstance(module, (nn.ModuleList, nn.Sequential))
            is_unit = isinstance(child, chosen) if chosen is not None else listed and not _never_runs(child)
            if is_unit and any(True for _ in child.parameters()):
                units.append(UnitSpec(path, child))
            elif chosen is None and _is_leaf(child, uses, tables) and _bytes(child, dtype) > limit:
                units.append(UnitSpec(path, child, leaf=True))
            else:
                walk(child, path)

    walk(model, "")
    if chosen is not None and not units:
        names = ", ".join(c.__name__ for c in chosen)
        raise ValueError(f"units: no module of class {names} in the model. Name a class that occurs in it.")
    root = UnitSpec("root", None)
    owner: dict[nn.Parameter, UnitSpec] = {}
    for unit in units:
        assert unit.module is not None
        for p in unit.module.parameters():
            owner[p] = root if p in owner else unit
    inside = {m for unit in units if unit.module is not None for m in unit.module.modules()}
    for module in model.modules():
        if module not in inside:
            for p in module.parameters(recurse=False):
                owner[p] = root
    for name, p in model.named_parameters():
        owner[p].params.append((name, p))
    leaves = any(unit.leaf for unit in units)
    return [unit for unit in [root, *units] if unit.params or (leaves and unit is root)]


def _never_runs(module: nn.Module) -> bool:
    """Whether parameters are used without a forward that could gather them: of a ParameterList, a ParameterDict or a plain
    Module, perhaps within lists of modules."""
    if type(module).forward is not nn.Module.forward or "forward" in vars(module):
        return False
    return any(True for _ in module.parameters(recurse=False)) or any(map(_never_runs, module.children()))


def _is_leaf(module: nn.Module, uses: Counter[nn.Parameter], tables: set[torch.Size]) -> bool:
    """Whether a module is an embedding, or has a weight of an embedding's shape (a head), and its parameters are its own, plain
    and tied to no other module's."""
    own = list(module.parameters(recurse=False))
    if len(own) < len(list(module.parameters())) or any(uses[p] > 1 or type(p) is not nn.Parameter for p in own):
        return False
    return any(p.shape in tables for p in own)


def _bytes(module: nn.Module, dtype: torch.dtype | None) -> int:
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in module.parameters())


@dataclass(frozen=True)
class BucketSpec:
    """Parameters of one unit that make a bucket: `members` are positions in the unit's list."""

    layout: Layout
    members: list[int]
    dtype: torch.dtype  # compute dtype
    trained: bool


def cut_buckets(params: Sequence[tuple[str, Tensor]], size: int, dtype: torch.dtype | None, limit: int) -> list[BucketSpec]:
    """Buckets of one unit: parameters of one dtype, trained or frozen, with or without values, in order.

    `dtype` is the compute dtype (None: each parameter's own), `limit` the bytes of a bucket. Looks at no value, so what is
    planned from shapes alone is what is built.
    """
    kinds: dict[tuple[torch.dtype, bool, bool], list[int]] = {}
    for index, (_, p) in enumerate(params):
        kinds.setdefault((p.dtype, p.requires_grad, p.is_meta), []).append(index)
    specs: list[BucketSpec] = []
    for (own, trained, _), members in kinds.items():
        target = dtype or own
        elements = max(limit // torch.finfo(target).bits * 8, 1)
        sizes = [(params[k][0], params[k][1].numel()) for k in members]
        parts = group([numel for _, numel in sizes], elements)
        for layout, part in zip(cut(sizes, size, elements), parts, strict=True):
            specs.append(BucketSpec(layout, [members[k] for k in part], target, trained))
    return specs


def names_of(model: nn.Module | None, groups: list[dict]) -> dict[nn.Parameter, str]:
    """A name for each parameter: the model's, the optimizer's own (named parameters), or its position."""
    names: dict[nn.Parameter, str] = {}
    if model is not None:
        for name, p in model.named_parameters():
            names.setdefault(p, name)
    for g, chosen in enumerate(groups):
        given = chosen.get("param_names")
        for k, p in enumerate(chosen["params"]):
            names.setdefault(p, given[k] if given is not None else f"group {g} parameter {k}")
    return names


def beside(
    model: nn.Module | None, params: Iterable[nn.Parameter], covered: set[nn.Parameter], dtype: torch.dtype | None
) -> int:
    """Bytes of the model's buffers, and of parameters without a bucket (frozen ones), which rest in compute dtype."""
    total = 0
    for p in dict.fromkeys([*params, *(model.parameters() if model is not None else [])]):
        if p not in covered:
            total += p.numel() * (dtype if dtype is not None and p.dtype == torch.float32 else p.dtype).itemsize
    return total + sum(b.numel() * b.element_size() for b in (model.buffers() if model is not None else []))


NOT_TRAINED = (
    "parameter '{name}': stage 3 shards every parameter of the model, and this one requires a gradient but is not in the "
    "optimizer. Add it to a param group or freeze it with requires_grad_(False)."
)


def check_dtype(name: str, p: Tensor) -> None:
    """Raises TypeError for a dtype that is not trained."""
    if p.dtype not in DTYPES:
        raise TypeError(
            f"parameter '{name}': expected float32, bfloat16 or float16, got {p.dtype}. Convert it, or leave it out of the "
            "optimizer's param groups."
        )


def check_shape(name: str, p: Tensor) -> None:
    """Raises ValueError for a lazy parameter."""
    if nn.parameter.is_lazy(p):
        raise ValueError(
            f"parameter '{name}': expected one with a shape, got a lazy one. Run the model once on a batch before."
        )


def check_compute_dtype(name: str, p: Tensor, dtype: torch.dtype | None) -> None:
    """Raises ValueError where a parameter cannot be computed with in `dtype` (None: its own)."""
    if dtype is not None and p.dtype not in (dtype, torch.float32):
        raise ValueError(
            f"parameter '{name}': param_dtype={dtype} expects float32 parameters (or its own dtype), got {p.dtype}."
        )


def device_of(params: Iterable[Tensor]) -> torch.device:
    """Where parameters are; a model on the meta device is filled where it would have been built."""
    default = torch.get_default_device()
    built = default if default.type == "cuda" else torch.device("cpu")
    return next((p.device for p in params if not p.is_meta), built)


def check_parameter(name: str, p: Tensor, device: torch.device, fillable: bool = False) -> None:
    """Raises TypeError or ValueError for a parameter that cannot be partitioned.

    fillable  on the meta device it is accepted: a module of the model says what it begins with
    """
    if type(p).__name__ == "DTensor" or hasattr(p, "_local_tensor"):
        raise TypeError(
            f"parameter '{name}': expected a plain parameter, got a DTensor, which FSDP or tensor parallelism has sharded "
            "already. Use the plain model and let zerolite shard it."
        )
    check_dtype(name, p)
    check_shape(name, p)
    if p.is_meta and fillable:
        return
    if p.is_meta:
        raise ValueError(
            f"parameter '{name}': expected a tensor with values, got one on the meta device. Pass the model whose modules "
            "initialise it when ZeroOptimizer is built, or call model.to_empty(device=...) and initialise it first."
        )
    if p.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"parameter '{name}': expected a CPU or CUDA tensor, got device {p.device}. Use model.cpu() or model.cuda()."
        )
    if p.device != device:
        raise ValueError(
            f"parameter '{name}': expected device {device} as the first parameter, got {p.device}. Use one device."
        )
    if p.layout != torch.strided:
        raise TypeError(f"parameter '{name}': expected a dense tensor, got layout {p.layout}.")


def check_trained(model: nn.Module, known: set[nn.Parameter]) -> None:
    """Raises ValueError for a parameter that requires a gradient and is not `known`, where parameters rest sharded."""
    for name, p in model.named_parameters():
        if p.requires_grad and p not in known:
            raise ValueError(NOT_TRAINED.format(name=name))


def check_owner(optimizer: object, owned: set[nn.Parameter]) -> None:
    """Raises TypeError for what is no optimizer, ValueError for one that has none of these parameters."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer instance or None, got {optimizer!r:.80}")
    if owned.isdisjoint(p for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("optimizer: expected one of the model's parameters, got one that has none of them.")


def check_model(model: nn.Module | None) -> None:
    """Raises for models that another wrapper already reduces or shards, and for sparse gradients."""
    if model is None:
        return
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel") or kind.startswith("FSDP"):
            raise TypeError(
                f"model: expected a plain module, got {kind}{f' at {name!r}' if name else ''}. zerolite averages and shards "
                "gradients itself: pass the model that is in it (model.module), and call that one in the loop."
            )
        if getattr(module, "sparse", False) is True and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise ValueError(f"module '{name}': expected dense gradients, got {kind}(sparse=True). Build it with sparse=False.")
