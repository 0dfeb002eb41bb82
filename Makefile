# Two commands: `make run` (the first comparison) and `make test`. Both set up .venv once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: run test check rota setup clean
run: $(STAMP)
	$(BIN)/shoal run examples/first_comparison.toml

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

check: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

rota: $(STAMP)
	$(BIN)/python scripts/rota.py

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[data,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist .shoal
