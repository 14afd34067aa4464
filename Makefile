# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make quickstart   own virtual environment, install, fine-tune a small model
#   make test         the same, then lint, types and the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Test files that run at a time.
JOBS ?= 2

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

# Files that share a process, so that torch starts once for all of them. The others have one each: what they patch or fill
# cannot reach another. Several processes at a time, each with one thread: tiny models gain nothing from more, and threads
# that wait for one another lose much.
LIGHT := $(wildcard $(patsubst %,tests/test_%.py,arena chunk_states config config_forms data data_bad_files data_order \
	data_sources device env eviction idle_reads layout memory_map metrics placement policy report simulated streams \
	tight trace units zoo))
ALONE := $(filter-out $(LIGHT),$(wildcard tests/test_*.py))
define each_file
	@printf '%s\n' tests/test_exactness.py "$(LIGHT)" $(filter-out tests/test_exactness.py,$(ALONE)) | \
		OMP_NUM_THREADS=1 xargs -P $(JOBS) -I FILES sh -c '\
		out=$$($(BIN)/python -m pytest -q -m $(1) FILES 2>&1); rc=$$?; printf "== FILES\n%s\n" "$$out"; exit $$rc'
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
