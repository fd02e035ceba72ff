# `make` lists what there is. Everything is installed into .venv; nothing outside this folder changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
PYTEST := $(BIN)/python -m pytest -n logical --dist worksteal --durations=15
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all lint types docs format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "ARGS='...' is handed on: make test ARGS='-k partition', make quickstart ARGS='--rounds 5'"

quickstart: $(VENV)/.runtime ## set up and train on real digits: FedLP, under a minute
	$(BIN)/fedlp run configs/quickstart.yaml $(ARGS)

test: $(VENV)/.development ## set up and run the fast tests: all that protects a change, in minutes
	$(PYTEST) -m 'not slow' $(ARGS)

test-all: $(VENV)/.development ## run every test: long tables, kills, processes, benchmark commands
	$(PYTEST) $(ARGS)

lint: $(VENV)/.development ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.development ## check types
	$(BIN)/mypy

docs: $(VENV)/.documentation ## set up and build the documentation; docs/_build/html/index.html is its first page
	$(BIN)/python -m sphinx -q -b html -W --keep-going $(ARGS) docs docs/_build/html

format: $(VENV)/.development ## repair style and formatting where a tool can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean: ## remove the environment and all caches; runs/ stays
	rm -rf $(VENV) build dist docs/_build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written only after its installation has succeeded, and is older than a changed setup.cfg.
$(VENV)/.development: $(VENV)/.python setup.cfg pyproject.toml
	@echo "Installing fedlp-jax with what its tests need into $(VENV) (minutes the first time) ..."
	@$(PIP) --editable '.[test,lint]'
	@touch $(VENV)/.runtime $@

$(VENV)/.documentation: $(VENV)/.python setup.cfg pyproject.toml
	@echo "Installing fedlp-jax with what its documentation needs into $(VENV) (minutes the first time) ..."
	@$(PIP) --editable '.[docs]'
	@touch $(VENV)/.runtime $@

$(VENV)/.runtime: $(VENV)/.python setup.cfg pyproject.toml
	@echo "Installing fedlp-jax into $(VENV) (minutes the first time) ..."
	@$(PIP) --editable .
	@touch $@

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fedlp-jax needs Python 3.11 or newer, and '$(PYTHON)' is not one:" \
	    "name one with 'make PYTHON=/path/to/python3.12 ...'." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "Python could not make a virtual environment in $(VENV)" \
	    "(on Debian and Ubuntu: apt-get install python3-venv)." >&2; exit 1; }
	@touch $@
