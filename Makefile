# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tools that look at the environment have one of their own, so that they do not see themselves.
TOOLS := build/tools
LOCK := build/lock

.PHONY: demo test lint types stubs benchmarks curves histories faults soak corruption fuzz lock sbom audit clean

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
	$(BIN)/python benchmarks/round_overhead.py --aggregation secure --holders 8 --size small --json benchmarks/secure_rounds.json
	$(BIN)/python benchmarks/secure_aggregation.py --json benchmarks/secure_aggregation.json
	$(BIN)/python benchmarks/quality.py --json benchmarks/quality.json
	$(BIN)/python benchmarks/simulation.py --json benchmarks/simulation.json
	$(BIN)/python benchmarks/noise.py --json benchmarks/noise.json
	$(BIN)/python -m benchmarks.accounting --json benchmarks/accounting.json
	$(BIN)/python benchmarks/histogram_auc.py --json benchmarks/histogram_auc.json
	$(BIN)/python benchmarks/central.py --json benchmarks/central.json
	$(BIN)/python benchmarks/recovery.py --json benchmarks/recovery.json
	$(BIN)/python benchmarks/many_holders.py --json benchmarks/many_holders.json

# The tables and plots of docs/results.md; three quarters of an hour.
curves: $(STAMP)
	$(BIN)/python benchmarks/curves.py
	$(BIN)/python benchmarks/flamby_epsilon.py
	$(BIN)/python benchmarks/poisoning.py --figure docs/results-poisoning.png
	$(BIN)/python benchmarks/trust.py

# Thousands of histories of the ledger, with crashes at every write; the suite plays a few hundred.
histories: $(STAMP)
	SOTTO_HISTORIES=5000 $(BIN)/python -m pytest --timeout 3600 tests/common/privacy/test_ledger_histories.py

# Whole runs, killed again and again (docs/faults.md); the suite plays 30. Half an hour on two cores.
# What failed is played again with the seed that it prints: SOTTO_FAULTS_SEED=1234 make faults
FAULTS ?= 500
faults: $(STAMP)
	$(BIN)/python -m tests.faults --runs $(FAULTS)

# Memory, descriptors and threads of a coordinator and four holders; fails where they grow. The
# figures of benchmarks/RESULTS.md are of make soak ROUNDS=10000, which takes a quarter of an hour.
ROUNDS ?= 1000
soak: $(STAMP)
	$(BIN)/python benchmarks/soak.py --rounds $(ROUNDS) --json benchmarks/soak.json

# Every byte of a checkpoint, a journal, a ledger and an answer, flipped in turn; the suite samples.
corruption: $(STAMP)
	SOTTO_CORRUPTION=all $(BIN)/python -m pytest --timeout 3600 tests/server/test_checkpoints.py \
	    tests/server/test_journal.py tests/common/privacy/test_ledger_damage.py \
	    tests/client/test_storage.py -k "flip or byte"

# What pip resolves today for Sotto and Ray, in an environment that begins empty. Make it with the
# oldest Python that pyproject.toml allows: make lock PYTHON=python3.11
lock: $(STAMP)
	$(PYTHON) -m venv --clear --without-pip $(LOCK)
	$(BIN)/pip --python $(LOCK)/bin/python install --quiet --editable '.[ray]'
	$(LOCK)/bin/python -m tools.lock > $(LOCK)/requirements.lock
	mv $(LOCK)/requirements.lock requirements.lock

# The software bill of materials of an environment: make sbom OF=/opt/sotto/bin/python
OF ?= $(BIN)/python
sbom: $(STAMP) $(TOOLS)/.installed
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	    --output-file sbom.json $(OF)

# Nightly: a million inputs and more to everything that reads what others wrote, guided by coverage.
FUZZ_INPUTS ?= 1500000
fuzz: $(STAMP)
	$(BIN)/pip install --quiet --editable '.[dev,fuzz]'
	$(BIN)/python -m tests.fuzz --inputs $(FUZZ_INPUTS)

# Before a release: make audit REQUIRE=--require
audit: $(STAMP) $(TOOLS)/.installed
	$(BIN)/python -m tools.audit --auditor $(TOOLS)/bin/pip-audit $(REQUIRE) requirements.lock

$(TOOLS)/.installed: Makefile
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet 'cyclonedx-bom>=7.3,<8' 'pip-audit>=2.9,<3'
	touch $@

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build sbom.json *.egg-info .mypy_cache .ruff_cache .pytest_cache
