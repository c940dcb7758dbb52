# Two commands matter: `make demo` and `make test`. Both set up everything they need in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# Tests run one process per core, each with one thread; tiny shapes gain nothing from more. Files run as they come: by
# number of tests, as is usual, the slowest would come last and leave a core idle.
ENVIRONMENT := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(ENVIRONMENT) $(BIN)/python -m pytest
JOBS ?= 2

.PHONY: setup demo test test-all test-integrations test-peft-suite test-versions lint bench clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)-integrations/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-integrations
	$(VENV)-integrations/bin/python -m pip install -q --upgrade pip
	$(VENV)-integrations/bin/python -m pip install -q -c constraints.txt torch
	$(VENV)-integrations/bin/python -m pip install -q -c constraints.txt -e '.[integrations]'
	touch $@

setup: $(VENV)/.ready

# Fine-tune a real pretrained encoder on real text, save, load, merge, eject; under five minutes on two cores.
demo: setup
	HF_HUB_OFFLINE=1 $(BIN)/python examples/demo/run.py

# Every law on a set of cells that covers each pair of (method, kind), (method, storage) and (law, family).
test: setup
	$(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Every law on every cell.
test-all: setup
	INLAY_ALL_CELLS=1 $(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder

# transformers, TRL, diffusers, sentence-transformers and accelerate on Inlay, where peft is not installed. The ordinary
# environment, which has peft, answers where a test needs to know what peft does.
test-integrations: setup $(VENV)-integrations/.ready
	$(ENVIRONMENT) $(VENV)-integrations/bin/python -m pytest tests/integrations -n $(JOBS) --dist loadfile

# PEFT's own tests against Inlay; writes docs/compatibility-suite.md and fails below 95 per cent. About half an hour.
$(VENV)-peft-suite/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-peft-suite
	$(VENV)-peft-suite/bin/python -m pip install -q --upgrade pip
	$(VENV)-peft-suite/bin/python -m pip install -q -c constraints.txt torch
	$(VENV)-peft-suite/bin/python -m pip install -q -c constraints.txt -e '.[transformers]' peft accelerate datasets \
		diffusers scipy parameterized pytest pytest-timeout
	touch $@

test-peft-suite: $(VENV)-peft-suite/.ready
	$(VENV)-peft-suite/bin/python tests/peft_suite/run.py --jobs $(JOBS)

# The oldest and newest supported transformers, and the oldest torch, each in an environment of its own.
test-versions: setup
	$(BIN)/python tests/versions.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks all --against peft

clean:
	rm -rf $(VENV) .venv-* dist build demo-output
