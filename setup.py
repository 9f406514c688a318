"""Builds the native kernels into the wheel. They use the LibTorch stable ABI: no link to a Python or a torch version.

Needs g++ or clang++ and PyTorch's headers, both at build time only. Without them the package installs all the
same and runs on its PyTorch reference kernels.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

CSRC = Path(__file__).parent / "csrc"
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11
X86 = platform.machine() in ("x86_64", "AMD64")
TABLES = [("kBaseline", "baseline", [])]
if X86:
    TABLES += [
        ("kAvx2", "avx2", ["-march=x86-64-v3"]),
        ("kAvx512", "avx512", ["-march=x86-64-v4", "-mprefer-vector-width=512"]),
    ]


def torch_root():
    """The installed torch package: importable, or in the environment that an isolated build is made for."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_paths()[key]) / "torch" for key in ("purelib", "platlib")]
    return next((path for path in candidates if (path / "include" / "torch" / "csrc" / "stable").is_dir()), None)


def compile_native(target):
    """Compiles csrc/ to `target`. Returns None, or why it could not."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    torch = torch_root()
    if not compiler or not shutil.which(compiler.split()[0]):
        return f"no C++ compiler ({compiler or 'g++ or clang++'})"
    if torch is None:
        return "no PyTorch headers: install torch first and build with --no-build-isolation"
    with tempfile.TemporaryDirectory() as build:
        jobs = [
            ("kernels_cpu.cpp", f"{name}.o", [f"-DZL_TABLE={table}", f'-DZL_NAME="{name}"', *march])
            for table, name, march in TABLES
        ]
        jobs += [(source, f"{source}.o", []) for source in ("dispatch.cpp", "pool.cpp")]
        jobs.append(("bindings.cpp", "bindings.cpp.o", [STABLE_ABI, "-isystem", str(torch / "include")]))
        commands = [
            [*compiler.split(), *FLAGS, *extra, "-c", str(CSRC / source), "-o", f"{build}/{output}"]
            for source, output, extra in jobs
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(lambda c: subprocess.run(c, capture_output=True, text=True), commands))
        link = [*compiler.split(), "-shared", "-o", str(target), *(f"{build}/{output}" for _, output, _ in jobs)]
        link += [f"-L{torch / 'lib'}", "-ltorch_cpu", "-pthread", "-static-libgcc"]
        if all(result.returncode == 0 for result in results):
            results.append(subprocess.run(link, capture_output=True, text=True))
        failed = next((result for result in results if result.returncode != 0), None)
        return None if failed is None else f"the compiler failed:\n{failed.stderr[-2000:]}"


class BuildNative(build_py):
    """build_py that also compiles the library (into the source tree for an editable install)."""

    def run(self):
        super().run()
        root = Path(__file__).parent if self.editable_mode else Path(self.build_lib)
        target = root / "zerolite" / "kernels" / "_native.so"
        target.parent.mkdir(parents=True, exist_ok=True)
        problem = compile_native(target)
        if problem:
            target.unlink(missing_ok=True)
            print(f"zerolite: native kernels are left out: {problem}", file=sys.stderr)
        else:
            self.native = str(target)

    def get_outputs(self, include_bytecode=True):
        return super().get_outputs(include_bytecode) + ([self.native] if hasattr(self, "native") else [])


class Wheel(bdist_wheel):
    """The library fits any Python 3 of this platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return True


if __name__ == "__main__":
    setup(distclass=PlatformDistribution, cmdclass={"build_py": BuildNative, "bdist_wheel": Wheel})
