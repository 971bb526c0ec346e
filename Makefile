# Every target makes the virtual environment and installs what it needs the first time.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# torchtune wants an older torchao than ours would be, so the tests find it in an environment of its own.
TORCHTUNE := .venv-torchtune
# Of `make fuzz` and `make attack`.
SEED ?= 1
COUNT ?= 2000
SHARE ?= 1
# Processes that share out the tests.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
ONLY ?=
# Of `make gpu`, which needs a Python with torch, and no network.
BUDGET_S ?= 330
GPU_WHEELS := .gpu-wheels
GPU_SITE ?= /tmp/regrow-gpu-site
GPU_JSON ?= gpu.json

.PHONY: help demo test check lint fuzz attack clean install gpu gpu-wheels docs reference

help:           ## this text
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 12

install: $(STAMP)  ## the virtual environment with everything in it

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade setuptools wheel
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	# By all cores, which pip does not; some packages hold templates that are no Python.
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true
	touch $@

$(TORCHTUNE)/.installed: constraints-torchtune.txt
	$(PYTHON) -m venv $(TORCHTUNE)
	$(TORCHTUNE)/bin/python -m pip install --quiet --no-compile --requirement constraints-torchtune.txt
	touch $@

demo: $(STAMP)  ## train the debug model on the standard library's own text, on the CPU
	$(BIN)/regrow experiment=demo

lint: $(STAMP)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint     ## lint and the fast tests
	$(BIN)/pytest -q -m 'not slow and not gpu' -n $(WORKERS)

test: $(STAMP) $(TORCHTUNE)/.installed  ## every test; installs Debian's Slurm and Chromium where they are missing
	tests/slurm/setup.sh
	tests/report/setup.sh
	$(BIN)/pytest -n $(WORKERS)

docs: $(STAMP)  ## the pages of docs/ as a site, in build/docs; warnings are errors
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

fuzz: $(STAMP)  ## hostile input, seeded, for about a minute (SEED, COUNT)
	$(BIN)/python -m tests.attack.fuzz --seed $(SEED) --count $(COUNT)

attack: $(STAMP)  ## every damage, error code and hostile document; SEED, SHARE and ONLY narrow it down
	$(BIN)/python -m tests.attack --seed $(SEED) --share $(SHARE) $(if $(ONLY),--only $(ONLY))

reference: $(STAMP)  ## docs/configuration.md, from the schemas
	$(BIN)/python -m regrow.launch.commands.configuration_page > docs/configuration.md

gpu-wheels: $(STAMP)  ## the packages that `make gpu` takes along, in .gpu-wheels, for CPython 3.12 on x86-64
	$(BIN)/python -m benchmarks.gpu_wheels $(GPU_WHEELS)

# Not in the virtual environment: a machine with a GPU has a torch that fits it, and often no network.
gpu:            ## what the one GPU here does, by PYTHON's own torch, within BUDGET_S seconds (ONLY=part,…; GPU_JSON)
	$(if $(wildcard $(GPU_WHEELS)/*.whl),$(PYTHON) -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
	  --upgrade --target $(GPU_SITE) $(GPU_WHEELS)/*.whl)
	PYTHONPATH=$(GPU_SITE):$(CURDIR)/src:$(CURDIR) $(PYTHON) -m benchmarks.gpu --budget $(BUDGET_S) --json $(GPU_JSON) \
	  $(if $(ONLY),--only $(ONLY))

clean:          ## remove what tools made; runs (outputs/) and the virtual environment stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
