# `make help` lists the targets. Variables: PYTHON makes .venv; TORCH is what pip installs as torch, as in
# `make test TORCH=torch==2.12.0` or TORCH=/path/to/torch.whl; ARGS goes to the demo
# and the benchmarks.
PYTHON ?= python3
# A torch that the user names is always installed; the default only where .venv has none that will do.
TORCH_GIVEN := $(if $(filter undefined,$(origin TORCH)),,$(TORCH))
TORCH ?= torch==2.13.0
EXTRAS := hf,onnx,viz,triton,dev
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.msa_compile_installed
HAS_TORCH := import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench quality census grammar gate check fmt clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## train a small model, make it sparse, compare; ARGS="--model NAME" takes a hub model
	$(BIN)/python -m examples.demo $(ARGS)

# One thread for each of the two workers: more would only wait for each other. Each worker starts with one half of the
# tests in order, so that a model that many tests share is compiled once.
# The Triton kernels run as numpy in processes of their own, because importing them decides how they run.
INTERPRETED := TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q tests/interpreted

test: check ## check, then the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow"
	$(INTERPRETED) -m "not slow"

test-all: check ## check, then every test, the slow ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q
	$(INTERPRETED)

census: $(STAMP) ## check every causal language model of transformers (about an hour); ARGS="llama bart" checks these
	$(BIN)/python -m benchmarks.census $(ARGS)

grammar: $(STAMP) ## check thousands of random spellings of attention (about half an hour)
	$(BIN)/python -m benchmarks.grammar $(ARGS)

gate: $(STAMP) ## compile the Triton kernels for every GPU, without one (a few minutes); ARGS="--chips 90"
	$(BIN)/python -m benchmarks.kernel_gate $(ARGS)

bench: $(STAMP) ## time sparse attention against dense, behind a correctness gate; ARGS="--quick" or "--help"
	$(BIN)/python -m benchmarks $(ARGS)

quality: $(STAMP) ## train small models and compare what selectors find (about half an hour); ARGS="--toy"
	$(BIN)/python -m benchmarks.quality $(ARGS)

check: $(STAMP) ## style, types and import law; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

fmt: $(STAMP) ## mend style and format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and builds; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# Only where there is none: a .venv made by hand is used as it is. A torch that $(PYTHON) has already is shared with it.
$(BIN)/python:
	@if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then shared=--system-site-packages; else shared=; fi; \
	set -x; $(PYTHON) -m venv $$shared .venv

# torch comes first and alone, so that nothing else decides which build it is. The stamp holds the TORCH that was named.
$(STAMP): pyproject.toml | $(BIN)/python
ifneq ($(TORCH_GIVEN),)
	$(BIN)/python -m pip install $(TORCH_GIVEN)
else
	@$(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null || (set -x; $(BIN)/python -m pip install $(TORCH))
endif
	$(BIN)/python -m pip install -e ".[$(EXTRAS)]"
	@echo '$(TORCH_GIVEN)' > $@

# Another TORCH than the one in the stamp: install again.
ifneq ($(TORCH_GIVEN),)
ifneq ($(TORCH_GIVEN),$(shell cat $(STAMP) 2>/dev/null))
.PHONY: $(STAMP)
endif
endif
