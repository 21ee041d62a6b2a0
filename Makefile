# The two commands: `make all` and `make test`. Each sets up .venv by itself.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
STUDY ?= smoke
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
BIN := .venv/bin
READY := .venv/.ready
# A worker a core, and no more than eight: each has torch in its memory, and the longest file ends no sooner.
TESTS = $(BIN)/python -m pytest --numprocesses $(CORES) --maxprocesses 8

.DEFAULT_GOAL := help
.PHONY: help setup all report test test-all test-fast gpu-check lint format lock clean

help: ## list the targets
	@echo "make TARGET [STUDY=smoke|desk|paper] [CORES=$(CORES)]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv with the exact versions of requirements.lock

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"Python {v[0]}.{v[1]} found, 3.11 or newer expected: make PYTHON=/path/to/python3.11")'
	@echo "installing into .venv (minutes, once) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

all: $(READY) ## run a study: data, training, evaluation, tables and plots
	$(BIN)/snakemake --cores $(CORES) all --config study=$(STUDY)
	@echo "tables, plots and metrics of the study: results/$(STUDY)/"

report: all ## write the study's self-contained HTML report
	$(BIN)/snakemake --config study=$(STUDY) --report results/$(STUDY)/report.html
	@echo "the report: results/$(STUDY)/report.html"

test: lint ## the code style, and the tests, on CORES cores (minutes); prints the slowest ten
	$(TESTS) -m "not exhaustive and not network" --durations=10

test-all: lint ## the same, with further cases of what they test
	$(TESTS) -m "not network" --durations=10

test-fast: $(READY) ## the unit tests alone, without the two engines
	$(TESTS) -m "not engine and not slow and not exhaustive and not network"

gpu-check: $(READY) ## whatever has never run on a GPU (minutes); without one on the CPU, the rest skipped
	$(BIN)/python benchmarks/gpu_check.py

lint: $(READY) ## check the code style and Snakemake's own advice
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

format: $(READY) ## put the code into the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/snakefmt Snakefile workflow

lock: $(READY) ## write requirements.lock anew from pyproject.toml (reaches the package index)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-tools
	$(BIN)/pip-compile --quiet --extra dev --strip-extras --allow-unsafe --no-header --no-annotate \
	  --no-emit-index-url --no-emit-trusted-host --output-file .venv/lock.txt pyproject.toml
	@{ echo '# The exact versions that `make` installs, of everything; written by `make lock` from pyproject.toml.'; \
	  echo '# On Linux, torch brings CUDA libraries of the versions that it pins itself.'; \
	  sed -e 's/+cpu$$//' -e '/^ *#/d' -e '/^--/d' -e '/^$$/d' .venv/lock.txt; } > requirements.lock

clean: ## remove everything that can be made again, but the environment
	rm -rf data/raw data/tokens .state .snakemake logs results/smoke
