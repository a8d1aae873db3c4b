# The two commands of the README: `make serve` and `make test`. Both need only Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: serve test lint clean

serve: $(VENV)/.serve
	$(BIN)/headrace serve $(ARGS)

test: $(VENV)/.test lint
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What an installation is made of: the kernels are compiled when the package is installed.
SOURCES := pyproject.toml setup.py $(wildcard executor_svc/ops/native/*.[ch] sampler_svc/native/*.[ch])

$(VENV)/.serve: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.test: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/.serve

clean:
	rm -rf $(VENV) build *.egg-info
