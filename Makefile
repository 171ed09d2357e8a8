# make demo, make test: a clean clone needs python >= 3.11 (with venv), make, a C compiler and a package index.
# PYTHON=python3.12 make … picks another interpreter for .venv.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# A test run is thousands of short processes: what one has compiled the others read.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-zero demo-ppo demo-tenants test test-deep bench lint clean
.DEFAULT_GOAL := test

demo: $(STAMP)
	$(BIN)/python recipes/demo/recipe.py

demo-zero: $(STAMP)
	$(BIN)/python recipes/demo/recipe.py --zero

demo-ppo: $(STAMP)
	$(BIN)/python recipes/demo/ppo.py

demo-tenants: $(STAMP)
	$(BIN)/python recipes/demo/tenants.py

test test-deep: export OMP_NUM_THREADS = 1

# Types are checked beside the tests: what either finds is the end's status.
test: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy & types=$$!; $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"; found=$$?; wait $$types && exit $$found

test-deep: lint
	NANOPOST_EXAMPLES=100 $(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[oracle,report]"
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.run all

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The install is done again when what it installs has changed, and never otherwise.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("nanopost needs Python 3.11 or later, $(PYTHON) is %d.%d: try PYTHON=python3.12 make" % v[:2])'
	@echo "Installing into .venv: torch 2.13.0, then nanopost with its extras report, kernels, test and dev (constraints.txt)"
	@start=$$(date +%s) \
	&& { test -x $(BIN)/python || $(PYTHON) -m venv .venv; } \
	&& $(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0 \
	&& $(BIN)/python -m pip install -q -c constraints.txt -e ".[report,kernels,test,dev]" \
	&& touch $@ \
	&& echo "Installed $$($(BIN)/python -m pip list --format=freeze | wc -l) packages in $$(($$(date +%s) - start)) seconds"
