# Environments, tests and the first run. `make help` lists the targets.

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
export PYTHON

VENV := .venv
BIN := $(VENV)/bin
# Written last, so that an interrupted installation is never taken for a finished one.
BUILT := $(VENV)/.built

# Each folder of tests is a pytest process of its own: what JAX and torch_xla are set to once holds for a process.
# Two at a time: most of their time goes into compiling on one core.
TEST_FOLDERS := $(patsubst tests/%/,test-%,$(sort $(dir $(wildcard tests/*/test_*.py))))
TEST_FILES := $(wildcard tests/test_*.py)
TEST_GROUPS := $(if $(TEST_FILES),test-files) $(TEST_FOLDERS)

# QUICKSTART_MESH=AxB trains on A x B virtual devices, A for fsdp and B for tensor.
ifneq ($(QUICKSTART_MESH),)
mesh_sizes := $(shell sed -nE 's/^([1-9][0-9]*)x([1-9][0-9]*)$$/\1 \2/p' <<< '$(subst ','\'',$(QUICKSTART_MESH))')
ifneq ($(filter quickstart,$(MAKECMDGOALS)),)
ifeq ($(mesh_sizes),)
$(error QUICKSTART_MESH=$(QUICKSTART_MESH) must be two whole numbers above 0, fsdp x tensor, such as 4x2)
endif
endif
mesh_settings := topology=cpu-$(shell echo $$(($(subst $() ,*,$(or $(mesh_sizes),1))))) mesh.fsdp=$(word 1,$(mesh_sizes)) mesh.tensor=$(word 2,$(mesh_sizes))
endif

.PHONY: help
help: ## this list
	@echo "usage: make TARGET [PYTHON=python3.12]"
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

.PHONY: quickstart
quickstart: $(BUILT) ## train a small model on embedded problems; QUICKSTART_MESH=4x2 for 8 virtual devices
	$(BIN)/tptrain train recipes/tiny_word_problems.py \
	    output_dir=runs/quickstart-$$(date +%Y%m%d-%H%M%S) $(mesh_settings) $(ARGS)

.PHONY: test
test: $(BUILT) ## lint and all tests, one process per folder of tests; all are run even if one fails
	@$(MAKE) --no-print-directory --keep-going --jobs=2 --output-sync=target lint $(TEST_GROUPS)

.PHONY: test-files $(TEST_FOLDERS)
test-files: $(BUILT)
	$(BIN)/python -m pytest $(TEST_FILES)
$(TEST_FOLDERS): test-%: $(BUILT)
	$(BIN)/python -m pytest tests/$*

.PHONY: test-vllm
test-vllm: $(BUILT) ## hold an export in a real vLLM against transformers; TPTRAIN_GSM8K names GSM8K's folder
	tools/ci/test_vllm.sh

.PHONY: test-compat
test-compat: $(BUILT) ## transformers 4 reads an export, the newest JAX a checkpoint
	tools/ci/test_compat.sh

.PHONY: lint
lint: $(BUILT) ## ruff and mypy
	@failed=0; \
	for check in "ruff check" "ruff format --check" "mypy tptrain tools"; do \
	    echo "$$check"; $(BIN)/$$check || failed=1; \
	done; \
	exit $$failed

.PHONY: bench
bench: $(BUILT) ## time to the first step, and a step beside plain torch
	$(BIN)/python tools/bench/first_steps.py $(ARGS)

.PHONY: bench-data
bench-data: $(BUILT) ## packing and preprocessing beside TRL's; TPTRAIN_GSM8K names GSM8K's folder
	tools/ci/make_trl_env.sh
	$(BIN)/python tools/bench/packing.py
	$(BIN)/python tools/bench/input.py

.PHONY: clean
clean: ## remove the environments, build/ and caches; runs/ stays
	rm -rf .venv .venv-vllm .venv-transformers4 .venv-jax .venv-trl build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find recipes tests tools tptrain -name __pycache__ -prune -exec rm -rf {} +

$(BUILT): pyproject.toml requirements/constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	    echo "tptrain needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is: $$("$(PYTHON)" -V 2>&1 || true)." \
	        "Name another one: make PYTHON=python3.12"; exit 1; }
	@echo "Installing tptrain and what it needs into $(VENV): some GB, a few minutes."
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input \
	    -c requirements/constraints.txt -e ".[dev,aot]"
	@touch $@
	@echo "Installed."
