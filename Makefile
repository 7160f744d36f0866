# Everything a contributor runs, from a bare clone: Python 3.11 or later and make are all that must be there.

PYTHON ?= python3
PIP_INSTALL_TORCH ?= torch==2.13.0
DEMO_ARGS ?=
STACK_ARGS ?=
PYTEST_ARGS ?=
# A file of tests stays in one process: what it has started serves all of it. One more than there are cores, for some wait.
PYTEST_JOBS ?= -n $(shell n=$$(($$(nproc) + 1)); echo $$((n < 4 ? n : 4))) --dist loadfile --no-loadscope-reorder
BENCH_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints-dev.txt
# A person watches pip's progress on the largest download; a log need not hold it.
QUIET := $(if $(CI),-qq)
# Named after what was installed, so that a switch of branch installs again exactly when it must.
STAMP := .venv/.installed-$(shell cat pyproject.toml constraints-dev.txt | cksum | cut -d ' ' -f 1)
WHEEL := build/wheel

.PHONY: help setup demo stack test lint types format bench dashboards golden wheel-test clean
.DEFAULT_GOAL := help

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "Variables: DEMO_ARGS, STACK_ARGS (--help lists them), PYTEST_ARGS, BENCH_ARGS are passed on; PYTEST_JOBS= runs the tests one by one; PYTHON chooses the interpreter of a new .venv;"
	@echo "PIP_INSTALL_TORCH chooses the build of torch, for example"
	@echo "  make setup PIP_INSTALL_TORCH='torch==2.13.0 --index-url URL-OF-THE-INDEX'"

setup: $(STAMP)  ## Make or update .venv (every other target does so by itself)
	@:

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "%s is Python %s; gradiometer needs 3.11 or later: make PYTHON=/path/to/one" % (sys.executable, sys.version.split()[0]))'
	@echo "[1/3] making .venv"
	@$(PYTHON) -m venv .venv

$(STAMP): | $(BIN)/python
	@echo "[2/3] installing torch: the largest download, and only once"
	@$(PIP) $(QUIET) $(PIP_INSTALL_TORCH)
	@echo "[3/3] installing gradiometer, editable, and the tools"
	@$(PIP) -qq -e '.[torch,monitor,dev]'
	@rm -f .venv/.installed-*
	@touch $@

demo: $(STAMP)  ## Train a small model under the agent and show what it measures
	@$(BIN)/gradiometer demo $(DEMO_ARGS)

stack: $(STAMP)  ## Run monitor, Prometheus, Alertmanager, Grafana if it is there, and a demo job, without Docker
	@$(BIN)/python -m deploy.stack $(STACK_ARGS)

test: $(STAMP)  ## Run the tests from the checkout
	@$(BIN)/python -m pytest $(PYTEST_JOBS) $(PYTEST_ARGS)

lint: $(STAMP)  ## Check style, formatting and that dashboards and rules match their Python
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python -m gradiometer_dashboards.build --check

types: $(STAMP)  ## Check types, strictly
	@$(BIN)/mypy

format: $(STAMP)  ## Format, and fix what can be fixed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP)  ## Run the benchmarks
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

dashboards: $(STAMP)  ## Generate the dashboards' JSON and the alert rules
	@$(BIN)/python -m gradiometer_dashboards.build

golden: $(STAMP) dashboards  ## Regenerate every golden file; read the diff before you commit it
	@$(BIN)/python -m pytest -q --update-golden $(PYTEST_ARGS)

wheel-test: $(STAMP)  ## Build sdist and wheel, and run the tests against the installed wheel
	@rm -rf $(WHEEL) && mkdir -p $(WHEEL)
	@$(BIN)/python -m build --no-isolation --outdir $(WHEEL)/dist
	@$(BIN)/python -m venv $(WHEEL)/venv
	@echo "installing the wheel and torch into a venv of their own"
	@$(WHEEL)/venv/bin/python -m pip install --disable-pip-version-check -qq -c constraints-dev.txt $(PIP_INSTALL_TORCH)
	@$(WHEEL)/venv/bin/python -m pip install --disable-pip-version-check -qq -c constraints-dev.txt \
		"$$(echo $(WHEEL)/dist/gradiometer-*.whl)[torch,monitor,dev]"
	@away=$$(mktemp -d) && trap 'rm -rf "$$away"' EXIT && cp -R tests pyproject.toml "$$away" && cd "$$away" \
		&& "$(CURDIR)/$(WHEEL)/venv/bin/python" -m pytest -p no:cacheprovider -m "not slow and not native" $(PYTEST_JOBS) $(PYTEST_ARGS)

clean:  ## Remove what was built and cached; .venv stays
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find agent monitor dashboards tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
