# What a fresh clone needs is make and Python 3.11 or newer; everything else goes into .venv, once.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
READY := .venv/.ready
PARITY := .venv/.parity
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help .venv demo test lint parity parity-full bench-attacks bench-train docs tiny-weights

help: ## list the targets
	@sed -n 's/^\([a-z.-]*\):.*## /make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

.venv: $(READY) ## install the package and its tools, if pyproject.toml is newer

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and \
	  f"{sys.executable} is Python {v}; expected 3.11 or newer; type for example: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo "installing into .venv (once; PyTorch is large, this takes some minutes)"
	@$(PYTHON) -m venv .venv
	@$(PIP) --editable '.[dev]'
	@touch $@

# Kept apart because only parity needs them: torchattacks pins an old requests and carries files of another
# project, CLIP_benchmark wants captioning metrics that nobody here calls.
$(PARITY): $(READY) Makefile
	@$(PIP) webdataset requests
	@$(PIP) --no-deps torchattacks clip-benchmark
	@touch $@

demo: $(READY) ## the whole loop on the built-in tiny world: train, attack, compare
	@$(BIN)/vlmrob demo

test: lint ## lint, type check and tests
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(READY) ## ruff, ruff format and mypy
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

parity: $(PARITY) ## compare the attacks with the reference packages
	@$(BIN)/python -m pytest -m parity

parity-full: $(PARITY) ## the same with full budgets, into benchmarks/parity.md; hours, goes on where it was killed
	@PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/parity/full.py

bench-attacks: $(PARITY) ## benchmarks/attacks.md: our attacks beside the references (25 minutes, one thread)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/attacks.py

bench-train: $(READY) ## benchmarks/training.md: a training step beside the released way and the floor (one minute)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/training.py

docs: $(READY) ## docs/reference: commands, cards and columns, as the code states them
	@$(BIN)/python docs/generate.py

tiny-weights: $(READY) ## make the shipped checkpoints of the tiny world again
	@$(BIN)/python -m robustbench_vlm.demo.weights
