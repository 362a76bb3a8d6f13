# `make demo` and `make test` do all set-up themselves: a virtual environment in .venv, once.
PYTHON ?= python3
VENV := .venv/bin
# Quiet, offline where a library would otherwise ask the network, no compiler at run time.
export HF_HUB_OFFLINE ?= 1
export PYTHONWARNINGS ?= ignore::FutureWarning

.PHONY: demo test test-gpu check clean

demo: .venv/installed
	$(VENV)/python -m launch demo

test: .venv/installed
	$(VENV)/python -m pytest -m "not gpu"

test-gpu: .venv/installed
	$(VENV)/python -m pytest -m gpu

check: .venv/installed
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

.venv/installed: pyproject.toml constraints.txt
	test -x $(VENV)/python || $(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf .venv runs corpora
