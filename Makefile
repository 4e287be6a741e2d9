# The two commands of the README: make demo and make test. demo installs the package alone, test its development tools too.
PYTHON ?= python3
BIN := .venv/bin
DEMO := none,retrain,full,lora

.PHONY: install develop demo readme test gate baseline slow perf perf-ratio soak mutants

install: .venv/installed

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

develop: .venv/developed

.venv/developed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ .venv/installed

demo: install
	$(BIN)/bench run --defense $(DEMO) --dataset digits --sigma .25
	$(BIN)/bench report --out demo

# The README's table and figure, from the demo's runs.
readme: demo
	rm -rf reports/digits-quick
	$(BIN)/bench report --out reports/digits-quick
	rm -f reports/digits-quick/*.pdf
	cd reports/digits-quick && ls *.svg | grep -v cost > ../../demo/figure
	sed -i.old "s|(reports/digits-quick/[^)]*)|(reports/digits-quick/$$(cat demo/figure))|" README.md && rm README.md.old
	sed -n '/^|/p' reports/digits-quick/report.md > demo/table
	sed -i.old -e '/<!-- table/,/<!-- end/{/^|/d;}' -e '/<!-- table/r demo/table' README.md && rm README.md.old

test: develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile
	$(MAKE) gate

# This repository's own gate: a pinned base and one thread, so that other machines differ in last bits alone; no cache.
GATE := --defense none,head --dataset digits --base reports/baselines/digits-vit.safetensors --examples 200 --n0 10 --n 200

gate: install
	rm -rf .ci-runs
	OMP_NUM_THREADS=1 CERTBENCH_CACHE=.ci-runs/cache $(BIN)/bench run $(GATE) --out .ci-runs/runs
	$(BIN)/bench check .ci-runs/runs --baseline reports/baselines/digits.json

baseline: install
	rm -rf .ci-runs
	OMP_NUM_THREADS=1 CERTBENCH_CACHE=.ci-runs/cache $(BIN)/bench run $(GATE) --out .ci-runs/runs
	$(BIN)/bench check .ci-runs/runs --baseline reports/baselines/digits.json --update

slow: develop
	$(BIN)/pytest -m slow

perf: develop
	$(BIN)/pytest tests/perf --benchmark-only --benchmark-columns=median,iqr,rounds

# The hot paths against another commit's, in turn on this machine; fails where one is slower (scripts/ratio.py).
BASE ?= origin/main
perf-ratio: develop
	$(BIN)/python scripts/ratio.py "$(BASE)"

# Some ten minutes: mistakes made on purpose in a copy of the code, each of which a test must find (scripts/mutants.py).
mutants: develop
	$(BIN)/python scripts/mutants.py

# Some minutes: five million votes, and ten thousand records resumed over and over. Linux.
soak: develop
	$(BIN)/python scripts/soak.py --out reports/soak
