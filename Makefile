# make test: everything a change must pass, from a fresh clone on. make lint: the quick part of it. make test-all: also
# what takes long, such as killing runs a hundred times.
PYTHON ?= python3
VENV = .venv/bin

.PHONY: test test-all test-export lint unit

test: lint unit

# Installed anew whenever the requirements change.
.venv/installed: requirements.txt requirements-dev.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(VENV)/pip install -q -r requirements-dev.txt
	touch $@

lint: .venv/installed
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

unit: .venv/installed
	$(VENV)/python -m pytest -n 2 --timeout 180

test-all: lint
	$(VENV)/python -m pytest -n 2 --timeout 900 -m "slow or not slow"

# Exports against llama.cpp, which is built from source (some 12 minutes on 2 cores).
test-export: .venv/installed
	$(VENV)/pip install -q -r requirements-export.txt
	$(VENV)/python tests/bench/llama_cpp_check.py
