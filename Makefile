# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make quickstart   own virtual environment, install, fine-tune a small model
#   make test         the same, then lint, types and the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

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

# One process for each file: peak-memory figures and patched entry points of one file cannot reach another.
define each_file
	@set -e; for file in tests/test_*.py; do \
		echo "== $$file"; $(BIN)/python -m pytest -q -m $(1) $$file; \
	done
endef

test: lint
	$(call each_file,"not full and not gpu")

test-full: lint
	$(call each_file,"not gpu")

# The parts of docs/ that are made from the code.
docs: $(STAMP)
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
