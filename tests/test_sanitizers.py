"""csrc/ under the address, undefined behaviour and thread sanitizers (tests/sanitize.cpp), and proof that they bite."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.timeout(400),  # compilers with sanitizers, beside other tests
]

MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREADS = ["-fsanitize=thread"]


def build(out: Path, csrc: Path, flags: list[str]) -> Path:
    """The driver and csrc/, with the flags that setup.py compiles with, at -O1."""
    spec = importlib.util.spec_from_file_location("zerolite_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    common = ["g++", *[f for f in setup.FLAGS if f != "-O3"], "-O1", "-g", *flags, f"-I{csrc}", "-c"]
    jobs = [
        ("kernels_cpu.cpp", f"{name}.o", [f"-DZL_TABLE={table}", f'-DZL_NAME="{name}"', *march])
        for table, name, march in setup.TABLES
    ]
    jobs += [(source, f"{source}.o", []) for source in ("dispatch.cpp", "pool.cpp")]
    commands = [[*common, *extra, str(csrc / source), "-o", str(out / output)] for source, output, extra in jobs]
    commands.append([*common, str(ROOT / "tests" / "sanitize.cpp"), "-o", str(out / "driver.o")])
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(lambda command: subprocess.run(command, capture_output=True, text=True), commands):
            assert result.returncode == 0, result.stderr
    binary = out / "sanitize"
    objects = [str(out / output) for _, output, _ in jobs] + [str(out / "driver.o")]
    subprocess.run(["g++", *flags, *objects, "-pthread", "-o", str(binary)], check=True)
    return binary


def run(binary: Path, what: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(binary), what], capture_output=True, text=True, timeout=300)


def broken(tmp_path: Path, name: str, right: str, wrong: str) -> Path:
    """A copy of csrc/ with one mistake."""
    copy = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", copy)
    source = copy / name
    text = source.read_text()
    assert right in text
    source.write_text(text.replace(right, wrong, 1))
    return copy


def test_kernels_stay_inside_their_tensors_and_within_defined_behaviour(tmp_path):
    result = run(build(tmp_path, ROOT / "csrc", MEMORY), "kernels")
    assert result.returncode == 0 and "tables" in result.stdout, result.stderr[-3000:]


def test_pool_and_flags_have_no_race(tmp_path):
    result = run(build(tmp_path, ROOT / "csrc", THREADS), "threads")
    assert result.returncode == 0 and "pool and flags" in result.stdout, result.stderr[-3000:]


def test_an_index_too_far_is_found(tmp_path):
    right = "for (int64_t i = 0; i < n; ++i) {\n    float p_ = p[i]"
    copy = broken(tmp_path, "kernels_cpu.cpp", right, right.replace("<", "<="))
    result = run(build(tmp_path, copy, MEMORY), "kernels")
    assert result.returncode != 0 and "overflow" in result.stderr


def test_a_relaxed_flag_is_found(tmp_path):
    copy = broken(tmp_path, "flags.h", "std::memory_order_release", "std::memory_order_relaxed")
    result = run(build(tmp_path, copy, THREADS), "threads")
    assert result.returncode != 0 and "data race" in result.stderr
