"""csrc/ under the address, undefined behaviour and thread sanitizers (tests/sanitize.cpp), and proof that they bite."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_kernels import ISAS

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.timeout(600),  # compilers with sanitizers, beside other tests
]

MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREADS = ["-fsanitize=thread"]


class Build:
    """Objects of the driver and of csrc/, with the flags that setup.py compiles with, unoptimised: compiling takes longer than
    running (at -O1 four times as long, of all instruction sets). The proof that a sanitizer bites compiles only what it breaks.

    every  all instruction sets that this processor has; else the baseline. The others' names stand for the baseline's kernels.
    """

    def __init__(self, out: Path, flags: list[str], every: bool) -> None:
        spec = importlib.util.spec_from_file_location("zerolite_setup", ROOT / "setup.py")
        setup = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(setup)
        self.out, self.flags = out, flags
        self.common = ["g++", *[f for f in setup.FLAGS if f != "-O3"], "-g", *flags, "-c"]
        count = len(ISAS) if every else 1
        self.jobs = {
            f"{name}.o": ("csrc/kernels_cpu.cpp", [f"-DZL_TABLE={table}", f'-DZL_NAME="{name}"', *march])
            for table, name, march in setup.TABLES[:count]
        }
        others = [table for table, *_ in setup.TABLES[count:]]
        self.alias = [f"-Wl,--defsym={_symbol(table)}={_symbol(setup.TABLES[0][0])}" for table in others]
        self.jobs |= {"dispatch.o": ("csrc/dispatch.cpp", []), "pool.o": ("csrc/pool.cpp", [])}
        self.jobs["driver.o"] = ("tests/sanitize.cpp", [])
        self.compile(ROOT, list(self.jobs))

    def compile(self, root: Path, names: list[str]) -> None:
        def one(name: str) -> subprocess.CompletedProcess[str]:
            source, extra = self.jobs[name]
            command = [*self.common, f"-I{root / 'csrc'}", *extra, str(root / source), "-o", str(self.out / name)]
            return subprocess.run(command, capture_output=True, text=True)

        with ThreadPoolExecutor(2) as pool:
            for result in pool.map(one, names):
                assert result.returncode == 0, result.stderr
        objects = [str(self.out / name) for name in self.jobs]
        subprocess.run(["g++", *self.flags, *objects, *self.alias, "-pthread", "-o", str(self.out / "sanitize")], check=True)

    def run(self, what: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(self.out / "sanitize"), what], capture_output=True, text=True, timeout=300)


def _symbol(table: str) -> str:
    """zerolite::table, as the linker knows it."""
    return f"_ZN8zerolite{len(table)}{table}E"


def broken(tmp_path: Path, name: str, right: str, wrong: str) -> Path:
    """A copy of the sources with one mistake."""
    for folder in ("csrc", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    source = tmp_path / "csrc" / name
    text = source.read_text()
    assert right in text
    source.write_text(text.replace(right, wrong, 1))
    return tmp_path


def test_kernels_stay_inside_their_tensors_and_within_defined_behaviour(tmp_path):
    build = Build(tmp_path, MEMORY, every=True)
    result = build.run("kernels")
    assert result.returncode == 0 and f"{len(ISAS)} tables" in result.stdout, result.stderr[-3000:]

    right = "for (int64_t i = 0; i < n; ++i) {\n    float p_ = p[i]"
    build.compile(broken(tmp_path / "far", "kernels_cpu.cpp", right, right.replace("<", "<=")), ["baseline.o"])
    result = build.run("kernels")
    assert result.returncode != 0 and "overflow" in result.stderr


def test_pool_and_flags_have_no_race(tmp_path):
    build = Build(tmp_path, THREADS, every=False)
    result = build.run("threads")
    assert result.returncode == 0 and "pool and flags" in result.stdout, result.stderr[-3000:]

    wrong = broken(tmp_path / "relaxed", "flags.h", "std::memory_order_release", "std::memory_order_relaxed")
    build.compile(wrong, ["pool.o", "driver.o"])
    result = build.run("threads")
    assert result.returncode != 0 and "data race" in result.stderr
