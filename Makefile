# The two commands of the README: make demo, make test. Both begin with make install.
PYTHON ?= python3
BIN := .venv/bin
DEMO := none,retrain,full,lora

.PHONY: install demo test slow perf

install: .venv/installed

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/bench run --defense $(DEMO) --dataset digits --sigma .25
	$(BIN)/bench report --out demo

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

slow: install
	$(BIN)/pytest -m slow

perf: install
	$(BIN)/pytest tests/perf --benchmark-only --benchmark-columns=median,iqr,rounds
