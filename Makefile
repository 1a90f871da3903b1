# One-word commands. Each makes the virtual environment from the lock file if that is missing or older, and nothing twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VIDEOS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format lock clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

demo: $(INSTALLED) ## from videos to an encoder pulled by name, on this machine; VIDEOS=<folder or URI> takes yours
	@exec $(BIN)/python jobs/demo.py $(if $(VIDEOS),--videos '$(VIDEOS)')

test: lint ## format, lint, types, and one test of each kind: what CI runs
	$(BIN)/pytest -m "not slow"

test-all: lint ## everything, the long tests too
	$(BIN)/pytest

lint: $(INSTALLED) ## format, lint and types, checked only
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED) ## rewrites the sources in the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(INSTALLED) ## pins what pyproject.toml asks for in requirements.lock; pins that still fit stay
	$(BIN)/pip-compile --quiet --extra cluster --extra onnx --extra services --extra dev --strip-extras --allow-unsafe \
		--no-emit-index-url --no-emit-find-links \
		--no-emit-trusted-host --output-file requirements.lock pyproject.toml

clean: ## removes the virtual environment and all caches of the tools
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: $(PYTHON) is missing or older than Python 3.11: install one, or name it: make PYTHON=python3.12" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) cannot make virtual environments: install its venv package (python3-venv)" >&2; \
		exit 1; }
	@echo "installing requirements.lock into $(VENV): some gigabytes, some minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.lock
	@$(BIN)/python -m pip install --disable-pip-version-check -qq --no-deps --no-build-isolation --editable .
	@touch $@
