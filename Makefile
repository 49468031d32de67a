# Each target makes .venv by itself, with pip and the pinned versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-thorough lint format docs rules bench clean

demo: $(VENV)/.done
	$(BIN)/python -m ftp demo

test: lint docs
	$(BIN)/python -m pytest

test-thorough: $(VENV)/.done
	$(BIN)/python -m pytest --hypothesis-profile thorough

lint: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

rules: $(VENV)/.done
	sed -i '/<!-- table -->/q' docs/reference/rules.md
	echo >> docs/reference/rules.md
	$(BIN)/hyperopt-nested rules --markdown >> docs/reference/rules.md

bench: $(VENV)/.done
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/hypergradients.py

clean:
	rm -rf $(VENV) site

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
