# `make demo` and `make test` do all set-up themselves: a virtual environment in .venv, once.
PYTHON ?= python3
VENV := .venv/bin
# Libraries in compiled languages that are installed where the index has wheels of them, and never built.
WHEELS := gigatoken,fastokens,splintr-rs,msgspec,awkward-cpp
INSTALL := $(VENV)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Quiet, offline where a library would otherwise ask the network, no compiler at run time.
export HF_HUB_OFFLINE ?= 1
export PYTHONWARNINGS ?= ignore::FutureWarning

.PHONY: demo test test-gpu check docs clean

demo: .venv/installed
	$(VENV)/python -m launch demo

test: .venv/installed
	$(VENV)/python -m pytest -m "not gpu"

test-gpu: .venv/installed
	$(VENV)/python -m pytest -m gpu

check: .venv/installed
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

docs: .venv/installed
	$(VENV)/python docs/make_configuration_keys.py

.venv/installed: pyproject.toml constraints.txt
	test -x $(VENV)/python || $(PYTHON) -m venv .venv
	$(INSTALL) --only-binary $(WHEELS) --editable ".[test,fast-prepare]" || $(INSTALL) --editable ".[test]"
	touch $@

clean:
	rm -rf .venv runs corpora
