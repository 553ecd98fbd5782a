# make train [ALGO=sac] [ENV=Hopper-v5] [FRAMES=50000] [SEED=1] [OVERRIDES="actor=gaussian"]    train; then `make ui`
# make test                                                                                     the test suite
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
# Files begin in the order of tests/conftest.py, not those of most tests first.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# Shells and other tools set variables of these names too: only those of the command line count.
$(foreach name,ALGO ENV FRAMES SEED OVERRIDES,$(if $(filter environment,$(origin $(name))),$(eval $(name) :=)))

PARAMETERS = $(strip -P algo=$(or $(ALGO),ppo) $(if $(ENV),-P env='$(ENV)') $(if $(FRAMES),-P total_frames='$(FRAMES)') \
  $(if $(SEED),-P seed='$(SEED)') $(if $(OVERRIDES),-P overrides='$(OVERRIDES)'))

.PHONY: help train gpu test test-slow test-environments docs-check torture check format wheel ui clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1|/' | column -t -s '|'

train: $(VENV)/.installed ## train as one MLflow run: ALGO=sac ENV=Hopper-v5 FRAMES=50000 SEED=1 OVERRIDES="key=value ..."
	$(BIN)/python -m pmoe_lightning.tracking.server
	PATH="$(BIN):$$PATH" mlflow run . --env-manager local --experiment-name pmoe_lightning $(PARAMETERS)
	@echo "look       make ui"

ui: $(VENV)/.installed ## look at the runs in a browser
	$(BIN)/python -m pmoe_lightning.tracking.ui

test: $(VENV)/.installed ## the test suite, minutes
	$(PYTEST)

test-slow: $(VENV)/.installed ## also the tests that train until something is learned
	$(PYTEST) -m "not torture and not docs and not environments"

test-environments: $(VENV)/.installed ## train on PyBullet's, Gymnasium-Robotics' and MetaWorld's tasks; installs them
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[pybullet,robotics]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps metaworld==3.1.1
	$(PYTEST) -m environments tests/test_environments.py

gpu: $(VENV)/.installed ## what an update takes on a GPU, in at most nine minutes; not yet run on one
	$(BIN)/python benchmarks/gpu.py

docs-check: $(VENV)/.installed ## run the train and evaluate commands of README and docs, shortened
	$(PYTEST) -m docs tests/test_docs.py

torture: $(VENV)/.installed ## the proofs of docs/reliability.md, resumable; torture-moments CASE="[ppo-7]" one of them, or one case
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m torture -s -p no:cacheprovider

torture-%: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m torture -s -p no:cacheprovider tests/torture/test_$*.py $(if $(CASE),-k '$(CASE)')

check: $(VENV)/.installed-dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## put style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.installed ## dist/*.whl
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean: ## remove the environment and caches, keep results
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "installing into $(VENV): several minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
