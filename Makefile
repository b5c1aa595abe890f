# Everything a person types; `make demo` and `make test` set themselves up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test test-all check format sandbox recipe-hallucination bench docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

setup: $(STAMP)  ## a virtual environment in .venv with qunlearn and its tools

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup  ## watch the sandbox model forget, under three minutes
	$(BIN)/qunlearn demo

test: setup  ## the fast tests, under five minutes on two cores
	$(BIN)/pytest -m "not slow"

test-all: setup  ## every test
	$(BIN)/pytest

check: setup  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## let ruff put things right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sandbox: setup  ## rebuild the embedded world and its two models, and compare with what is packaged
	$(BIN)/python -m qunlearn.sandbox.build

# The recipe on the sandbox; on the real thing: make recipe-hallucination MODEL=llama-7b BAD=bad.jsonl
MODEL ?=
BAD ?=
recipe-hallucination: setup  ## a whole scenario; MODEL= and BAD= for your own
	$(if $(MODEL),$(if $(BAD),,$(error MODEL= also needs BAD=, the file of what it must not say any more)))\
	$(BIN)/qunlearn forget -c recipes/hallucination.yaml $(if $(MODEL),--model "$(MODEL)") $(if $(BAD),--bad "$(BAD)") $(ARGS)

bench: setup  ## time and forgetting on the sandbox, every kind; writes the README's table
	$(BIN)/python benchmarks/sandbox.py

docs: setup  ## write docs/evaluation.md from the docstrings
	$(BIN)/python -m qunlearn.evaluate.document > docs/evaluation.md

clean:  ## remove what was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
