# Each target works from a clean clone: it makes .venv, installs the pinned requirements, builds what it needs.
# `make VENV= <target>` uses the interpreter at hand instead (PYTHON=python3) and installs nothing.
VENV ?= .venv
ifeq ($(strip $(VENV)),)
PYTHON ?= python3
BIN :=
READY :=
else
PYTHON := $(VENV)/bin/python
BIN := $(VENV)/bin/
READY := $(VENV)/.ready
endif
# gpu-check runs on the machine's own torch unless VENV is given: nothing is downloaded.
GPU_PYTHON := $(if $(filter file,$(origin VENV)),python3,$(PYTHON))
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PYTEST_ARGS ?=
# As many at a time as there are cores, where the environment is ours.
WORKERS := $(if $(READY),-n auto --dist worksteal)

.PHONY: help build test bench lint format gpu-check clean

help:
	@echo 'make build      environment and native libraries'
	@echo 'make test       the whole test suite            (PYTEST_ARGS="-k resnet" for a part)'
	@echo 'make bench      the main benchmark against stock PyTorch, with a plot; builds only what it needs here'
	@echo 'make lint       ruff, clang-format, mypy         (make format mends what they can)'
	@echo 'make gpu-check  on a machine with a CUDA GPU: build, tests, sanitizer, benchmarks'
	@echo 'make clean      remove what was built'
	@echo 'VENV= uses the interpreter at hand and installs nothing.'

$(VENV)/.ready: constraints.txt pyproject.toml tools/requirements.py
	python3 -m venv $(VENV)
	$(PYTHON) tools/requirements.py bench dev examples peers > $(VENV)/requirements.txt
	$(PYTHON) -m pip install --quiet -c constraints.txt -r $(VENV)/requirements.txt
	@touch $@

build: $(READY)
	$(PYTHON) setup.py --quiet build_ext --inplace

test: build
	$(PYTHON) -m pytest $(WORKERS) $(PYTEST_ARGS)

# Without a GPU the CUDA library, more than half of the build, is left out.
bench: $(READY)
	$(PYTHON) setup.py --quiet build_ext --inplace --for-this-machine
	$(PYTHON) -m benchmarks run --suite quick

lint: $(READY)
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(BIN)clang-format --dry-run -Werror $(CXX_FILES)
	$(PYTHON) -m mypy

format: $(READY)
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format
	$(BIN)clang-format -i $(CXX_FILES)

gpu-check:
	@$(GPU_PYTHON) tools/gpu_check.py

clean:
	rm -rf build dist wheels *.egg-info advdl_ops/lib advdl_ops/_C.*.so .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
