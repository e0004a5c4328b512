# make demo    compile a small diffusion transformer with dkfuse, compare it with eager and fp64, show the coverage
# make test    run the tests (CPU; with a GPU: make test PYTEST_ARGS='-m gpu')
# make check   ruff, the type checker and a wheel build
# make torchao test models with torchao's quantised weights, without torchao in .venv, where it prints as it is imported
# make triton  compile the kernels for a GPU that need not be there, by the oldest Triton that is supported
#
# Each makes .venv first, with a CPU build of torch where there is no NVIDIA GPU. TORCH='torch==2.12.0' and
# PYTHON=python3.12 choose others.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# PyPI's torch for Linux is a CUDA build of several GB. Without a GPU a CPU build is taken from where pip is configured
# to look, else from PyTorch's own index, else whatever pip finds.
ifdef TORCH
INSTALL_TORCH = $(BIN)/python -m pip install '$(TORCH)'
else ifeq ($(HAS_GPU),yes)
INSTALL_TORCH = $(BIN)/python -m pip install 'torch>=2.11'
else
CPU_TORCH = torch==2.13.0
CPU_INDEX = https://download.pytorch.org/whl/cpu
INSTALL_TORCH = $(BIN)/python -m pip install --quiet '$(CPU_TORCH)+cpu' 2>/dev/null \
	|| $(BIN)/python -m pip install --extra-index-url $(CPU_INDEX) '$(CPU_TORCH)+cpu' \
	|| $(BIN)/python -m pip install '$(CPU_TORCH)'
endif

.PHONY: demo test check lint types wheel triton torchao clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

check: lint types wheel

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The folders have other names than the packages, so the checker sees a copy in the layout of the wheel.
types: $(STAMP)
	rm -rf build/types && mkdir -p build/types
	cp -R fusion_pass build/types/dkfuse && cp -R patterns kernels build/types/dkfuse/
	cd build/types && $(abspath $(BIN))/mypy -p dkfuse --config-file $(abspath pyproject.toml)

wheel: $(STAMP)
	rm -rf dist build/lib build/bdist*
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	ls -l dist

# Beside the newest one in .venv: what both compile, those between compile too.
OLDEST_TRITON = 3.6.0
triton: $(STAMP)
	test -d build/triton-$(OLDEST_TRITON) || $(BIN)/python -m pip install --quiet --no-deps \
		--target build/triton-$(OLDEST_TRITON) 'triton==$(OLDEST_TRITON)'
	PYTHONPATH=build/triton-$(OLDEST_TRITON) $(BIN)/python -c \
		'import triton; assert triton.__version__ == "$(OLDEST_TRITON)", triton.__file__'
	PYTHONPATH=build/triton-$(OLDEST_TRITON) $(BIN)/python -m pytest -q tests/test_kernels_compiled.py \
		tests/test_rope_compiled.py

TORCHAO = 0.18.0
torchao: $(STAMP)
	test -d build/torchao-$(TORCHAO) || $(BIN)/python -m pip install --quiet --no-deps \
		--target build/torchao-$(TORCHAO) 'torchao==$(TORCHAO)'
	PYTHONPATH=build/torchao-$(TORCHAO) $(BIN)/python -m pytest -q -k "quantized or int8 or fp8" \
		tests/test_scenarios.py tests/test_as_served.py

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=23' 'setuptools>=77,<82' wheel
	$(INSTALL_TORCH)
	$(BIN)/python -m pip install --no-build-isolation -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
