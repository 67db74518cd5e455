# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types stubs benchmarks clean

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

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
