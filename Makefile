# Everything a person or a machine does with this repository, one word each. `make` alone lists the words.
# GNU make 3.81 or newer (Debian, macOS). Choose the interpreter with `make setup PYTHON=python3.12`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Two processes of two threads each on two cores slow each other down many times over while they spin: let them sleep.
CALM := OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test check fix bench docs reference constraints clean distclean

help: ## list the words
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -e 's/:.*## /	/' | awk -F '	' '{ printf "  make %-12s %s\n", $$1, $$2 }'

setup: $(VENV)/.ready ## create .venv with the pinned dependencies

$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make setup: '$(PYTHON)' is not on the PATH; install Python 3.11 or newer, or name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "make setup: $(PYTHON) is Python %d.%d; weftlm needs 3.11 or newer: make setup PYTHON=python3.12" % v[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make setup: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing weftlm and its dependencies into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

demo: setup ## the whole pipeline on built-in text, in about eight minutes: runs/demo/report.html
	$(BIN)/weftlm demo $(DEMO_ARGS)

test: setup ## the whole test suite; narrow it with TEST_ARGS="tests/unit -k sampler"
	$(CALM) $(BIN)/python -m pytest -n 2 $(TEST_ARGS)

check: setup ## style, types, layers, and that generated documents are current
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate_reference.py --check
	$(BIN)/python docs/methods_table.py --check
	$(BIN)/python docs/benchmark_table.py --check

fix: setup ## what can be mended by machine: style, format, generated documents
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/python docs/generate_reference.py
	$(BIN)/python docs/methods_table.py
	$(BIN)/python docs/benchmark_table.py

# A benchmark is a file in benchmarks/ that can be run; without FULL=1 each takes about a minute and writes no results.
BENCH_ARGS := $(if $(FULL),,--quick --json)

bench: setup ## every benchmark, quickly; FULL=1 regenerates benchmarks/results (hours)
	@set -e; for file in $$(grep -l '__main__' benchmarks/[a-z]*.py); do echo "== $$file $(BENCH_ARGS)"; $(BIN)/python $$file $(BENCH_ARGS); done

docs: $(VENV)/.ready-docs reference ## the documentation site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

reference: setup ## docs/reference from the commands and the recipe's models, the table of methods from the registries
	$(BIN)/python docs/generate_reference.py
	$(BIN)/python docs/methods_table.py

# Pins are made from what the ranges of pyproject.toml resolve to today. The build of torch is left to the machine:
# no local version suffix, and not the accelerator libraries torch itself pins.
constraints: ## resolve the ranges afresh into constraints.txt
	rm -rf .venv-constraints
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH),'torch==$(TORCH)') '.[dev,docs]'
	{ sed -n '/^#/p' constraints.txt; .venv-constraints/bin/python -m pip freeze --exclude weftlm \
		| sed -E -e 's/\+[a-z0-9.]+$$//' -e '/ @ /d' -e '/^(-|#)/d' -e '/^(nvidia|cuda|triton)/d'; } > constraints.tmp
	mv constraints.tmp constraints.txt
	rm -rf .venv-constraints

clean: ## what tools left behind, and the built site; runs/ and .venv stay
	rm -rf site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache src/*.egg-info
	find src tests benchmarks examples docs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and .venv
	rm -rf $(VENV)
