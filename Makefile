# `make run` and `make test` set everything up by themselves; all they need is Python 3.11 or newer.
# Another interpreter: make run PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --constraint constraints.txt --editable

# Stamps: the environment is touched again only when what it is made from has changed.
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed

PROMPT := Write a short story about a lighthouse keeper who finds a message in a bottle.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test lint types docs model format constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: model ## install, fetch the default model, stream text through a rolling cache
	$(BIN)/longburn generate --window 1024 --sink-tokens 4 --max-new-tokens 200 --temperature 0 --prompt "$(PROMPT)"

test: lint types docs model ## all that CI runs: lint, types, docs, then the tests (README and examples executed)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

lint: $(DEV) ## ruff: lint and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV) ## mypy --strict on the package
	$(BIN)/mypy

docs: export NO_MKDOCS_2_WARNING := 1 # a notice of the theme about its own future
docs: $(DEV) ## build the documentation into site/; a broken link is an error
	$(BIN)/mkdocs build --strict --quiet

model: $(RUNTIME) ## fetch the default model into the user's cache, unless it is there and whole
	$(BIN)/longburn models get smollm2

format: $(DEV) ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: TORCH := 2.13.0
constraints: FRESH := build/constraints
constraints: ## resolve every dependency anew, in a clean environment, and write constraints.txt
	rm -rf $(FRESH)
	$(PYTHON) -m venv $(FRESH)
	$(FRESH)/bin/python -m pip install torch==$(TORCH) --editable '.[dev,docs]'
	( echo torch==$(TORCH); $(FRESH)/bin/python -m pip freeze --exclude-editable --exclude torch ) > constraints.txt

clean: ## remove the environment and all that was built (fetched models stay in the user's cache)
	rm -rf $(VENV) build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(RUNTIME): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "longburn needs Python 3.11 or newer;" \
	  "$(PYTHON) is: $$($(PYTHON) --version 2>&1). Name another one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) .
	@touch $@

$(DEV): $(RUNTIME)
	$(PIP_INSTALL) '.[dev,docs]'
	@touch $@
