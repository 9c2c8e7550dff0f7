# Two commands for a newcomer: `make demo` and `make test`. Needs Python >= 3.11, git and make; everything else is
# installed into $(VENV). A second run finds the stamp and starts at once.

PYTHON ?= python3
VENV   ?= .venv
OUTPUT ?= runs/demo
# A process a core, up to four (each needs about 1 GB); files whole, for their fixtures. One test: see CONTRIBUTING.md.
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist loadfile

BIN   := $(VENV)/bin
# What users install, which the demo needs; and with it what the project is tested with.
BASE  := $(VENV)/.for-users
STAMP := $(VENV)/.installed
# --no-compile: bytecode is written for the modules that are used, when they are used; a third of the set-up time saved.
PIP   := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
# uv needs a tenth of pip's time; but it does not read pip's settings, so where it fails, say for a private index, pip does.
UV    := $(BIN)/uv pip install --quiet --python $(BIN)/python

# Bytecode: without it every fresh process spends seconds on imports, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check format bench results clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with everything the project is tested with

# torch comes first, by pip, so that no other package's range chooses its build.
$(BASE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python >= 3.11 is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11 setup" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)" "$$(grep '^uv==' constraints.txt)"
	$(UV) -c constraints.txt -e ".[all]" || $(PIP) -c constraints.txt -e ".[all]"
	@touch $@

$(STAMP): $(BASE)
	$(UV) -c constraints.txt -e ".[all,dev]" || $(PIP) -c constraints.txt -e ".[all,dev]"
	@touch $@

demo: $(BASE) ## train, pack, compare, export and describe a tiny Sana, into runs/demo
	$(BIN)/fbqat demo --output $(OUTPUT)

test: setup ## the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: setup ## every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

check: setup ## lint, format, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## speed and size of the packed model, into benchmarks/results
	$(BIN)/python benchmarks/speed_cpu.py

results: demo ## make demo, then track its results and rewrite the tables of the documents
	cp $(OUTPUT)/results.json benchmarks/results/method.json
	cp $(OUTPUT)/images/comparison.png docs/images/comparison.png
	$(BIN)/python -m benchmarks.method.report
	$(BIN)/python -m benchmarks.tables

clean: ## remove builds and caches (keeps .venv and runs)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV)
