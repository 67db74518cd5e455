# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types stubs benchmarks curves histories clean

demo: $(STAMP)
	$(BIN)/sotto demo

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

stubs: $(STAMP)
	$(BIN)/python -m common.link.generate

benchmarks: $(STAMP)
	$(BIN)/python benchmarks/round_overhead.py --json benchmarks/round_overhead.json
	$(BIN)/python benchmarks/quality.py --json benchmarks/quality.json
	$(BIN)/python benchmarks/simulation.py --json benchmarks/simulation.json
	$(BIN)/python benchmarks/noise.py --json benchmarks/noise.json
	$(BIN)/python -m benchmarks.accounting --json benchmarks/accounting.json
	$(BIN)/python benchmarks/histogram_auc.py --json benchmarks/histogram_auc.json
	$(BIN)/python benchmarks/central.py --json benchmarks/central.json

# The tables and plots of docs/results.md; half an hour.
curves: $(STAMP)
	$(BIN)/python benchmarks/curves.py
	$(BIN)/python benchmarks/flamby_epsilon.py

# Thousands of histories of the ledger, with crashes at every write; the suite plays a few hundred.
histories: $(STAMP)
	SOTTO_HISTORIES=5000 $(BIN)/python -m pytest --timeout 3600 tests/common/privacy/test_ledger_histories.py

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
