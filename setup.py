"""Builds the native kernels into the wheel. They use the LibTorch stable ABI: no link to a Python or a torch version.

Needs g++ or clang++ and PyTorch's headers, both at build time only. Without them the package installs all the
same and runs on its PyTorch reference kernels.

CUDA kernels are built as well where nvcc is found (CUDA_HOME, CUDA_PATH, PATH); a GPU or a CUDA build of torch is not needed.
ZEROLITE_CUDA=0 leaves them out, ZEROLITE_CUDA=1 makes it an error if they cannot be built. ZEROLITE_CUDA_ARCHS
names other architectures than 80,90,100, for an nvcc that does not know these.
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
        ("kAvx512Vbmi", "avx512vbmi", ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512vbmi", "-mgfni"]),
    ]

# Each operation rounded by itself and subnormals kept, as on the host: same bits.
CUDA_FLAGS = ["-std=c++20", "-O3", "--fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false"]


def torch_root():
    """The installed torch package: importable, or in the environment that an isolated build is made for."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_paths()[key]) / "torch" for key in ("purelib", "platlib")]
    return next((path for path in candidates if (path / "include" / "torch" / "csrc" / "stable").is_dir()), None)


def compile_native(target):
    """Compiles csrc/ to `target`. Returns None, or why it could not."""
    compiler, torch, problem = tools()
    if problem:
        return problem
    with tempfile.TemporaryDirectory() as build:
        jobs = [
            ("kernels_cpu.cpp", f"{name}.o", [f"-DZL_TABLE={table}", f'-DZL_NAME="{name}"', *march])
            for table, name, march in TABLES
        ]
        jobs += [(source, f"{source}.o", []) for source in ("dispatch.cpp", "pool.cpp")]
        jobs.append(("bindings.cpp", "bindings.cpp.o", [STABLE_ABI, "-isystem", str(torch / "include")]))
        commands = [
            [*compiler, *FLAGS, *extra, "-c", str(CSRC / source), "-o", f"{build}/{output}"] for source, output, extra in jobs
        ]
        link = [*compiler, "-shared", "-o", str(target), *(f"{build}/{output}" for _, output, _ in jobs)]
        link += [f"-L{torch / 'lib'}", "-ltorch_cpu", "-pthread", "-static-libgcc"]
        return run(commands, link)


def compile_cuda(target):
    """Compiles csrc/cuda to `target`, machine code for each architecture and PTX of the newest. Returns None, or why not."""
    compiler, torch, problem = tools()
    nvcc = find_nvcc()
    if nvcc is None:
        return "no nvcc in CUDA_HOME, CUDA_PATH or PATH"
    if problem:
        return problem
    archs = os.environ.get("ZEROLITE_CUDA_ARCHS", "80,90,100").split(",")
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    with tempfile.TemporaryDirectory() as build:
        objects = [f"{build}/kernels.o", f"{build}/bindings.o"]
        include = [STABLE_ABI, "-isystem", str(torch / "include")]
        host = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"]
        cuda = [nvcc, *CUDA_FLAGS, "--threads", "0", *host, *code, "-c", str(CSRC / "cuda" / "kernels.cu"), "-o", objects[0]]
        bind = [*compiler, *FLAGS, *include, "-c", str(CSRC / "cuda" / "bindings.cpp"), "-o", objects[1]]
        # nvcc links its runtime statically; torch's CUDA libraries are looked up at run time.
        link = [nvcc, "-shared", "--no-device-link", "-o", str(target), *objects, f"-L{torch / 'lib'}", "-ltorch_cpu", "-ldl"]
        return run([cuda, bind], link)


def tools():
    """The C++ compiler as a list of words, the torch package, and what is missing."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    torch = torch_root()
    if not compiler or not shutil.which(compiler.split()[0]):
        return [], torch, f"no C++ compiler ({compiler or 'g++ or clang++'})"
    if torch is None:
        return [], torch, "no PyTorch headers: install torch first and build with --no-build-isolation"
    return compiler.split(), torch, None


def find_nvcc():
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return next((found for home in homes if (found := shutil.which("nvcc", path=f"{home}/bin"))), shutil.which("nvcc"))


def run(commands, link):
    """Runs `commands` side by side, then `link`. Returns None, or the first failure's message."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda c: subprocess.run(c, capture_output=True, text=True), commands))
    if all(result.returncode == 0 for result in results):
        results.append(subprocess.run(link, capture_output=True, text=True))
    failed = next((result for result in results if result.returncode != 0), None)
    return None if failed is None else f"the compiler failed:\n{(failed.stderr or failed.stdout)[-2000:]}"


def build_cuda(target):
    """Builds `target` as ZEROLITE_CUDA says. Returns whether it is there."""
    choice = os.environ.get("ZEROLITE_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"ZEROLITE_CUDA: expected '0', '1' or 'auto', got {choice!r}")
    problem = "ZEROLITE_CUDA=0" if choice == "0" else compile_cuda(target)
    if problem is None:
        return True
    target.unlink(missing_ok=True)
    if choice == "1":
        raise SystemExit(f"zerolite: ZEROLITE_CUDA=1, but the CUDA kernels could not be built: {problem}")
    if choice == "auto":
        print(f"zerolite: CUDA kernels are left out: {problem.strip().replace(chr(10), ' ')}", file=sys.stderr)
    return False


class BuildNative(build_py):
    """build_py that also compiles the libraries (into the source tree for an editable install)."""

    def run(self):
        super().run()
        root = Path(__file__).parent if self.editable_mode else Path(self.build_lib)
        target = root / "zerolite" / "kernels" / "_native.so"
        target.parent.mkdir(parents=True, exist_ok=True)
        problem = compile_native(target)
        if problem:
            target.unlink(missing_ok=True)
            print(f"zerolite: native kernels are left out: {problem}", file=sys.stderr)
        self.compiled = [] if problem else [str(target)]
        cuda = target.with_name("_cuda.so")
        self.compiled += [str(cuda)] if build_cuda(cuda) else []

    def get_outputs(self, include_bytecode=True):
        return super().get_outputs(include_bytecode) + getattr(self, "compiled", [])


class Wheel(bdist_wheel):
    """The libraries fit any Python 3 of this platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return True


if __name__ == "__main__":
    setup(distclass=PlatformDistribution, cmdclass={"build_py": BuildNative, "bdist_wheel": Wheel})
