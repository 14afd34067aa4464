# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make quickstart   own virtual environment, install, fine-tune a small model
#   make test         the same, then lint, types and the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests that run at a time: on two cores a third fills the time in which others wait.
JOBS ?= 3

.PHONY: quickstart test test-full lint docs install clean

install: $(STAMP)

# torch first and pinned: any later request for torch is then already satisfied.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/zero train configs/quickstart.toml

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes that each start torch once, each with one thread: tiny models gain nothing from more, and threads that
# wait for one another lose much.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

test: lint
	$(PYTEST) -m "not full and not gpu"

test-full: lint
	$(PYTEST) -m "not gpu"

# The parts of docs/ that are made from the code.
docs: $(STAMP)
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
