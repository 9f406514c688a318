"""Imports go downward only, and the rules that keep the code from branching on a stage."""

from __future__ import annotations

import ast
from pathlib import Path

import zerolite

ROOT = Path(zerolite.__file__).parent
LAYERS = {
    "version": 0,
    "layout": 0,
    "backward": 0,
    "options": 0,
    "parts": 0,
    "placement": 0,
    "records": 0,
    "host": 1,
    "partition": 1,
    "buffer": 1,
    "kernels": 1,
    "meta": 1,
    "safetensors": 1,
    "comm": 2,
    "moments": 2,
    "dtypes": 1,
    "worker": 1,
    "entry": 3,
    "pending": 2,
    "early": 5,
    "together": 3,
    "arrivals": 3,
    "average": 3,
    "writes": 3,
    "check": 5,
    "stream": 3,
    "feed": 3,
    "updates": 4,
    "update": 2,
    "probe": 1,
    "gradient": 3,
    "bucket": 3,
    "reducer": 3,
    "norm": 3,
    "unit": 3,
    "memory": 4,
    "views": 1,
    "shown": 1,
    "lazy_grad": 4,
    "grads": 4,
    "hooks": 4,
    "whole": 4,
    "values": 4,
    "checkpoint": 4,
    "loading": 4,
    "rates": 3,
    "shapes": 1,
    "cost": 3,
    "planner": 4,
    "auto": 4,
    "build": 5,
    "pretrained": 5,
    "saved": 6,
    "optimizer": 5,
    "timeline": 6,
    "__init__": 6,
    "cli": 6,
    "__main__": 7,
}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield (parts[0] if parts[0] != "__init__" else "__init__"), path, ast.parse(path.read_text())


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "zerolite":
            rest = node.module.split(".")[1:]
            yield from [rest[0]] if rest else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [a.name.split(".")[1] for a in node.names if a.name.startswith("zerolite.")]


def test_every_module_has_a_layer():
    assert {name for name, _, _ in modules()} == set(LAYERS)


def test_imports_go_downward_only():
    found = 0
    for name, path, tree in modules():
        for target in imported(tree):
            found += 1
            assert LAYERS[target] <= LAYERS[name], f"{path.name} (layer {LAYERS[name]}) imports {target} ({LAYERS[target]})"
    assert found > 30


def test_the_lowest_layers_know_no_torch():
    for name, path, tree in modules():
        if LAYERS[name] == 0:
            names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
            names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
            assert not any(n.split(".")[0] == "torch" for n in names), path


def test_only_the_plan_compares_stages_and_nobody_a_world():
    for name, path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare) and name != "placement":
                text = ast.unparse(node)
                assert ".stage" not in text and "stage ==" not in text and "size == 1" not in text, f"{path}: {text}"


def test_hooks_touch_no_tensor_and_buckets_register_no_hook():
    text = {name: path.read_text() for name, path, _ in modules()}
    assert "register_" not in text["bucket"] + text["gradient"] + text["reducer"] + text["unit"]
    assert not any(word in text["hooks"] for word in (".data", "copy_(", "torch.empty", "torch.zeros"))


def test_files_and_functions_stay_small():
    for _, path, tree in modules():
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


FACTORIES = {
    "arange",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
}


def test_tensors_are_made_on_a_device_that_is_named():
    """Else a program's torch.set_default_device("cuda") would move control data to a GPU."""
    found = 0
    for _, path, tree in modules():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) in {f"torch.{name}" for name in FACTORIES}:
                found += 1
                assert any(word.arg == "device" for word in call.keywords), f"{path.name}:{call.lineno}: {ast.unparse(call)}"
    assert found > 30
