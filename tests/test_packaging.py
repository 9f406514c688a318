"""The wheel: native library inside, any Python 3; without a compiler it still installs and works."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tracked sources, so that nothing built here is picked up."""
    target = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md", "constraints.txt"):
        shutil.copy(ROOT / name, target)
    shutil.copytree(ROOT / "csrc", target / "csrc")
    shutil.copytree(ROOT / "zerolite", target / "zerolite", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return target


def wheel(source, out, **env):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True, timeout=110, env={**os.environ, "ZEROLITE_CUDA": "0", **env}, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def run(folder, code):
    env = {**os.environ, "PYTHONPATH": str(folder)}
    env.pop("ZEROLITE_KERNELS", None)
    return subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, timeout=60, cwd=folder)


USE = """
import torch, zerolite, sys
from zerolite import kernels
p = torch.nn.Parameter(torch.ones(70))
optimizer = zerolite.ZeroOptimizer(torch.optim.AdamW([p], lr=0.5))
p.sum().backward()
optimizer.step()
assert abs(p[0].item() - 0.495) < 1e-6, p  # 1 * (1 - 0.5 * 0.01) - 0.5
print(kernels.kernels_in_use(), zerolite.__file__)
"""


def test_the_wheel_holds_the_native_library(source, tmp_path):
    compiler = tmp_path / "g++"  # not optimised: setup has compiled what the other tests use
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX") or shutil.which("g++") or "clang++"} "$@" -O0\n')
    compiler.chmod(0o755)
    path = wheel(source, tmp_path, CXX=str(compiler))
    assert path.name.startswith("zerolite-") and "-py3-none-" in path.name and not path.name.endswith("-any.whl")
    names = zipfile.ZipFile(path).namelist()
    for name in ("zerolite/kernels/_native.so", "zerolite/py.typed", "zerolite/comm/group.py"):
        assert name in names
    modules = {path.relative_to(source).as_posix() for path in (source / "zerolite").rglob("*.py")}
    assert modules <= set(names), modules - set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    zipfile.ZipFile(path).extractall(tmp_path / "site")
    result = run(tmp_path / "site", USE)
    assert result.returncode == 0, result.stderr
    kernels, where = result.stdout.split()
    assert kernels in ("baseline", "avx2", "avx512", "avx512vbmi") and where.startswith(str(tmp_path)) and result.stderr == ""


def test_without_a_compiler_it_installs_and_says_so_once(source, tmp_path):
    path = wheel(source, tmp_path, CXX="/no/such/compiler")
    assert "zerolite/kernels/_native.so" not in zipfile.ZipFile(path).namelist()
    zipfile.ZipFile(path).extractall(tmp_path / "site")
    result = run(tmp_path / "site", USE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0] == "reference"
    assert result.stderr.count("no native kernels") == 1 and "Install a C++ compiler" in result.stderr


def test_the_source_distribution_is_complete(source, tmp_path):
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)],
        cwd=source,
        check=True,
        timeout=60,
        capture_output=True,
    )
    (path,) = tmp_path.glob("*.tar.gz")
    names = subprocess.run(["tar", "tf", str(path)], capture_output=True, text=True, check=True).stdout
    for name in (
        "csrc/adam_math.h",
        "csrc/bindings.cpp",
        "csrc/cuda/kernels.cu",
        "csrc/cuda/lanes.h",
        "zerolite/py.typed",
        "LICENSE",
        "setup.py",
    ):
        assert f"/{name}\n" in names


@pytest.fixture
def build(monkeypatch):
    spec = importlib.util.spec_from_file_location("zerolite_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("ZEROLITE_CUDA", raising=False)
    return module


@pytest.mark.parametrize("nvcc,reason", [(None, "no nvcc in CUDA_HOME"), ("/bin/false", "the compiler failed")])
def test_cuda_kernels_are_left_out_with_one_line_or_demanded(build, nvcc, reason, monkeypatch, capsys, tmp_path):
    target = tmp_path / "_cuda.so"
    target.write_text("of an older build")
    monkeypatch.setattr(build, "find_nvcc", lambda: nvcc)
    assert not build.build_cuda(target) and not target.exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"CUDA kernels are left out: {reason}" in said
    monkeypatch.setenv("ZEROLITE_CUDA", "1")
    with pytest.raises(SystemExit, match=f"ZEROLITE_CUDA=1, but .*{reason}"):
        build.build_cuda(target)
    monkeypatch.setenv("ZEROLITE_CUDA", "0")
    assert not build.build_cuda(target) and capsys.readouterr().err == ""
    monkeypatch.setenv("ZEROLITE_CUDA", "yes")
    with pytest.raises(SystemExit, match="expected '0', '1' or 'auto', got 'yes'"):
        build.build_cuda(target)


def test_nvcc_is_found_by_home_first(build, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_nvcc() == str(tmp_path / "bin" / "nvcc")
