# Every target sets up what it needs in .venv; PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: demo test lint types wheel clean

demo: $(VENV)/.base
	$(BIN)/python decode/demo.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/.test
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: $(VENV)/.test
	$(BIN)/pyright

wheel: $(VENV)/.test
	rm -rf build dist
	$(BIN)/python -m build --wheel >/dev/null

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Separate stamps: the demo needs neither torch nor the test tools.
$(VENV)/.base: pyproject.toml | $(BIN)/python
	$(PIP) install -e .
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[test]'
	touch $(VENV)/.base $@
