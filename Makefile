# `make demo` and `make test` do all set-up themselves: a virtual environment in .venv, once.
PYTHON ?= python3
VENV := .venv/bin
# Libraries in compiled languages that are installed where the index has wheels of them, and never built.
WHEELS := gigatoken,fastokens,splintr-rs,msgspec,awkward-cpp
INSTALL := $(VENV)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Quiet, offline where a library would otherwise ask the network, no compiler at run time.
export HF_HUB_OFFLINE ?= 1
export PYTHONWARNINGS ?= ignore::FutureWarning

# A test process a core; more of them than four would mostly make the same corpora again. PROCESSES=0: in one process.
PROCESSES ?= logical
PYTEST := $(VENV)/python -m pytest -n $(PROCESSES) --maxprocesses 4 --dist worksteal
test test-slurm test-layouts test-fuzz test-long test-fast test-random: export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slurm test-layouts test-fuzz test-long test-fast test-random test-gpu check docs clean

demo: .venv/installed
	$(VENV)/python -m launch demo

test: .venv/installed
	$(PYTEST) -m "not gpu and not layouts and not slurm and not fuzz and not long" $(ARGS)

# The combinations of layouts that `make test` leaves out.
test-layouts: .venv/installed
	$(PYTEST) -m layouts $(ARGS)

# On a cluster of two nodes that the tests start on this machine: apt-get install slurmctld slurmd slurm-client munge.
test-slurm: .venv/installed
	$(VENV)/python -m pytest -m slurm $(ARGS)

# Damaged files of all kinds: the cases that `make test` leaves out.
test-fuzz: .venv/installed
	$(PYTEST) -m fuzz $(ARGS)

# What takes long, and seldom fails where nothing of `make test` does.
test-long: .venv/installed
	$(PYTEST) -m long $(ARGS)

# What one runs while working: below two minutes, every package, no training run.
test-fast: .venv/installed
	$(PYTEST) -m "not gpu and not slow and not layouts and not slurm and not fuzz and not long" $(ARGS)

# In random order, its seed in the first lines; ARGS=--randomly-seed=N repeats one.
test-random: .venv/installed
	$(PYTEST) -m "not gpu and not layouts and not slurm and not fuzz and not long" -p randomly --randomly-dont-reset-seed $(ARGS)

test-gpu: .venv/installed
	$(VENV)/python -m pytest -m gpu

check: .venv/installed
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy

docs: .venv/installed
	$(VENV)/python docs/make_configuration_keys.py

.venv/installed: pyproject.toml constraints.txt
	test -x $(VENV)/python || $(PYTHON) -m venv .venv
	$(INSTALL) --only-binary $(WHEELS) --editable ".[test,fast-prepare]" || $(INSTALL) --editable ".[test]"
	touch $@

clean:
	rm -rf .venv runs corpora
