# make demo   train a small GPT-2 at every stage and compare     make test   the test suite
# make lint   style and types      make peers bench  measurements, with DeepSpeed beside
# make cuda   compile the CUDA kernels for all architectures, or say why not
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup cuda demo test lint format peers bench clean

setup: .venv/.native

# torch first and pinned: an unpinned requirement of another package would fetch a different build.
.venv/.packages: constraints.txt pyproject.toml
	@echo "setting up .venv (once)"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch setuptools wheel numpy
	@$(PIP) $$($(BIN)/python -c "import tomllib; e = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; print(*['%s' % r.replace(' ', '') for r in e['demo'] + e['dev']])")
	@touch $@

.venv/.native: .venv/.packages setup.py $(wildcard csrc/* csrc/cuda/*)
	@echo "building the native kernels"
	@$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

# Setup builds the CUDA kernels too where it finds nvcc; this says why where it could not. No GPU needed.
cuda: .venv/.packages
	@$(BIN)/python -c "from pathlib import Path; import setup, sys; sys.exit(setup.compile_cuda(Path('zerolite/kernels/_cuda.so')))"

demo: setup
	@$(BIN)/python examples/demo.py

# Most tests wait for processes: a worker for each core, each with whatever is next.
test: setup
	@$(BIN)/python -m pytest -n auto --dist worksteal $(TEST)

lint: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: setup
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .

# DeepSpeed, to measure against; its CPU Adam compiles at first use, with ninja.
peers: .venv/.peers
.venv/.peers: .venv/.native
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PIP) --no-build-isolation deepspeed==0.19.8 ninja
	@touch $@

# About 45 minutes on 2 cores; BENCH="--preset quick" takes 5, "--preset full" a night, "--dry-run" says what would run.
bench: setup
	@$(BIN)/python -m benchmarks run $(BENCH)

clean:
	rm -rf .venv build dist out *.egg-info zerolite/kernels/_native.so zerolite/kernels/_cuda.so
