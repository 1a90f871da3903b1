# One-word commands. Each first creates the virtual environment from the lock file if it is missing or older than that file.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VIDEOS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format lock clean
.DELETE_ON_ERROR:

help: ## list these commands
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

demo: $(INSTALLED) ## turn videos into an encoder pulled by name, on this machine; VIDEOS=<folder or URI> for your own
	@exec $(BIN)/python jobs/demo.py $(if $(VIDEOS),--videos '$(VIDEOS)')

test: lint ## check format, lint and types, and run one test of each kind, as CI does
	$(BIN)/pytest -m "not slow"

test-all: lint ## run all tests, also the long ones
	$(BIN)/pytest

lint: $(INSTALLED) ## check format, lint and types; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED) ## rewrite the sources in the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(INSTALLED) ## pin the requirements of pyproject.toml in requirements.lock; keeps pins that still fit
	$(BIN)/pip-compile --quiet --extra cluster --extra onnx --extra services --extra dev --strip-extras --allow-unsafe \
		--no-emit-index-url --no-emit-find-links \
		--no-emit-trusted-host --output-file requirements.lock pyproject.toml

clean: ## remove the virtual environment and the caches of all tools
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: $(PYTHON) is missing or older than Python 3.11: install it, or give its name: make PYTHON=python3.12" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) cannot create virtual environments: install its venv package (python3-venv)" >&2; \
		exit 1; }
	@echo "installing requirements.lock into $(VENV): several gigabytes and minutes, only once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.lock
	@$(BIN)/python -m pip install --disable-pip-version-check -qq --no-deps --no-build-isolation --editable .
	@touch $@
