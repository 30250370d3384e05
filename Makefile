# Two commands do all the set-up: `make tune` and `make test`; `make bench` measures beside other systems, in about half an hour. PYTHON chooses the interpreter (3.10 or later).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: tune test test-all quick coverage lint types docs bench clean

tune: $(VENV)/installed
	@$(BIN)/autoaccum tune --target-batch 120 $(ARGS)

test: lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Also the long tests: before a change is handed in.
test-all: lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal --all

# The inner loop: lint, and the tests that start no process.
quick: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal --quick

coverage: $(VENV)/tested
	$(BIN)/python -m pytest -n 2 --dist worksteal --all --cov autoaccum --cov-report term:skip-covered

lint: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/tested
	$(BIN)/mypy

docs: $(VENV)/tested
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet -f site/mkdocs.yml
	@echo "build/site/index.html"

bench: $(VENV)/tested
	$(BIN)/python benchmarks/side_by_side.py --again --output benchmarks/results/side_by_side.json
	$(BIN)/python benchmarks/loop.py --output benchmarks/results/loop.json
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf $(VENV) build dist *.egg-info

# torch first and alone: installed after it, nothing else can replace it by another build.
$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or later is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable .
	@touch $@

$(VENV)/tested: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[test]'
	@touch $@
