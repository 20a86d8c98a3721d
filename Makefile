# Everything runs in an environment of its own (VENV), made on first use. Variables that may be set on the command line:
#   PYTHON  interpreter that creates the environment (default: the first that is Python 3.11 or newer and has venv)
#   VENV    where the environment lives (default .venv)
#   EXTRAS  further optional dependencies, comma separated, for example EXTRAS=cuda13 or EXTRAS=wandb,datasets
#   WORKERS processes that share the tests (default 2; compiling, most of their time, keeps one core busy each)
#   PYTEST_ARGS  passed on to pytest
VENV ?= .venv
EXTRAS ?=
WORKERS ?= 2
PYTEST_ARGS ?=

comma := ,
BIN := $(VENV)/bin
ALL_EXTRAS := dev,tokenizers,safetensors$(if $(EXTRAS),$(comma)$(EXTRAS))
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
STAMP := $(VENV)/.setup-$(subst $(comma),-,$(ALL_EXTRAS))

.DEFAULT_GOAL := help
.PHONY: help setup train test test-fast test-gpu lint format

help:
	@echo "make setup      create the environment in $(VENV) and install everything into it"
	@echo "make train      train the tiny preset on the shipped text into runs/tiny (continues a run that was stopped)"
	@echo "make test       run all tests; make test-fast leaves out the slow ones; make test-gpu runs those for a GPU"
	@echo "make lint       check format, style and types; make format repairs what it can"

setup: $(STAMP)

$(STAMP): pyproject.toml $(wildcard constraints/*.txt) tools/setup_environment.sh
	bash tools/setup_environment.sh "$(VENV)" "$(ALL_EXTRAS)" "$(PYTHON)"
	@touch "$@"

# Huge pages for the scratch memory of a step take a fifth off its time on a CPU (docs/performance.md).
train: setup
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python train.py --config=configs/tiny.py --workdir=runs/tiny

test: setup
	$(PYTEST) -m "not gpu" $(PYTEST_ARGS)

test-fast: setup
	$(PYTEST) -m "not slow and not gpu" $(PYTEST_ARGS)

test-gpu: setup
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

lint: setup
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/python -m pyright --pythonpath $(BIN)/python

format: setup
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .
