# The two commands of the README: make demo, make test. Both begin with make install.
PYTHON ?= python3
BIN := .venv/bin
DEMO := none,retrain,full,lora

.PHONY: install demo readme test slow perf

install: .venv/installed

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/bench run --defense $(DEMO) --dataset digits --sigma .25
	$(BIN)/bench report --out demo

# The README's table and figure, from the demo's runs.
readme: demo
	$(BIN)/bench report --out reports/digits-quick
	sed -n '/^|/p' reports/digits-quick/report.md > demo/table
	sed -i.old -e '/<!-- table/,/<!-- end/{/^|/d;}' -e '/<!-- table/r demo/table' README.md && rm README.md.old

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

slow: install
	$(BIN)/pytest -m slow

perf: install
	$(BIN)/pytest tests/perf --benchmark-only --benchmark-columns=median,iqr,rounds
