# LightMedVLM: `make` lists the targets. Set-up is part of run and test; a second call skips it at once.
# Works with GNU make 3.81 (macOS) and later.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The interpreter of the environment: the first of these that is Python 3.11 to 3.13.
PYTHON ?=
CANDIDATES := $(PYTHON) python3 python3.13 python3.12 python3.11 python
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

# Options of `lightmedvlm run`, for example: make run ARGS="--profile smoke --from 02"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup run test demo backbones lint lock clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name text; do \
		printf '  make %-10s %s\n' "$$name" "$$text"; done

setup: $(READY) ## make .venv with the exact versions of requirements.txt

run: $(READY) ## run the course: nine notebooks, a trained and evaluated model (ARGS="--profile smoke ...")
	@$(BIN)/python -m lightmedvlm_utils run $(ARGS)

test: $(READY) ## run all tests, the whole chain at the smoke profile included
	@$(BIN)/python -m pytest $(ARGS)

demo: $(READY) ## open the demo notebook in JupyterLab
	@$(BIN)/python -m jupyter lab notebooks/08_demo.ipynb

backbones: $(READY) ## pretrain the shipped small backbones again (some hours on 2 cores)
	@$(BIN)/python -m lightmedvlm_utils.pretrain $(ARGS)

lint: $(READY) ## check style, format and types
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

lock: ## resolve requirements.txt from pyproject.toml, keeping what still fits (ARGS=--upgrade: nothing; needs uv)
	@command -v uv >/dev/null || { echo "make lock needs uv: pip install uv"; exit 1; }
	@uv pip compile pyproject.toml --universal --python-version 3.11 --extra test \
		--no-emit-index-url --no-header --quiet --output-file requirements.txt $(ARGS)

clean: ## remove the environment and caches; outputs/ stays
	@rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info build
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.txt pyproject.toml
	@set -e; \
	if ! [ -x $(BIN)/python ] || ! $(BIN)/python -c '$(SUPPORTED)' 2>/dev/null; then \
		found=; \
		for candidate in $(CANDIDATES); do \
			if $$candidate -c '$(SUPPORTED)' >/dev/null 2>&1; then found=$$candidate; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "No Python 3.11, 3.12 or 3.13 was found; install one, or name it: make PYTHON=/path/to/python3.12" >&2; \
			exit 1; \
		fi; \
		echo "Making $(VENV) with $$($$found --version)"; \
		rm -rf $(VENV); \
		$$found -m venv $(VENV) || { rm -rf $(VENV); \
			echo "Making $(VENV) failed; on Debian and Ubuntu install the package python3-venv." >&2; exit 1; }; \
	fi; \
	echo "Installing the packages of requirements.txt (several minutes the first time)"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --retries 10 -r requirements.txt; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps --editable .; \
	touch $@
