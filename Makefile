# Everything here creates the environment that it needs. On a machine where the default package index gives torch's CUDA
# build, name the CPU one:  make venv TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

venv: $(READY) ## create .venv with everything for development

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,benchmarks]'
	@touch $@

demo: $(READY) ## run the main job on the handwritten digits that scikit-learn ships
	$(BIN)/python examples/digits/demo.py

test: lint ## everything: style, types, tests
	$(BIN)/python -m pytest -q

lint: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## bring the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what tools leave behind; .venv and runs/ stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .venv-ci
	find automl_compress benchmarks examples tests -name __pycache__ -type d -prune -exec rm -rf {} +
