# The two commands of the README: make demo and make test. demo installs only the package, test also its development tools.
PYTHON ?= python3
BIN := .venv/bin
DEMO := none,retrain,full,lora

.PHONY: install develop demo demo-record reports lint type suite test gate baseline slow fuzz oldest perf perf-ratio soak mutants fidelity docs reference

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

# Keep the records of the demo's runs, and make their page.
demo-record: demo
	rm -rf reports/digits-quick
	$(BIN)/bench export runs --record reports/digits-quick/runs
	$(BIN)/bench verify reports/digits-quick/runs --json > reports/digits-quick/verified.json
	$(MAKE) reports

# Make every table and figure of reports/ that has records again (scripts/remake_reports.py).
reports: install
	$(BIN)/python scripts/remake_reports.py

# The parts of make test, each a job of CI.
lint: develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/typos

type: develop
	$(BIN)/mypy

# Three processes on two cores, since some tests wait; files in their order, so that those with few but long tests are not last.
suite: develop
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

test: develop
	$(MAKE) lint
	$(MAKE) type
	$(MAKE) suite
	$(MAKE) gate

# This repository's own gate: a pinned base, one thread and no cache, so that other machines differ only in last bits.
GATE := --defense none,head --dataset digits --base reports/baselines/digits-vit.safetensors --examples 200 --n0 10 --n 200

gate: install
	rm -rf .ci-runs
	OMP_NUM_THREADS=1 CERTBENCH_CACHE=.ci-runs/cache $(BIN)/bench run $(GATE) --out .ci-runs/runs
	$(BIN)/bench check .ci-runs/runs --baseline reports/baselines/digits.json

baseline: install
	rm -rf .ci-runs
	OMP_NUM_THREADS=1 CERTBENCH_CACHE=.ci-runs/cache $(BIN)/bench run $(GATE) --out .ci-runs/runs
	$(BIN)/bench check .ci-runs/runs --baseline reports/baselines/digits.json --update

# Minutes of training, Ray clusters, and all mutants.
slow: develop
	$(BIN)/pytest -m slow

# Random inputs for every reader of untrusted files, SECONDS for each of fifteen properties.
SECONDS ?= 60
fuzz: develop
	$(BIN)/python tests/fuzz/search.py all $(SECONDS) --seed "$$(date +%s)"

# The default suite on the oldest versions that pyproject.toml allows, in an environment of its own.
oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --editable '.[dev]' --constraint tests/oldest.txt
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest -n 2 --dist loadfile \
		--deselect 'tests/defenses/test_coordinator.py::test_an_encoder_without_class_token_is_refused_by_name' \
		--deselect 'tests/defenses/test_peft.py::test_no_prompts_is_the_base'

# About ten minutes on an otherwise idle machine.
perf: develop
	$(BIN)/python -m pip install --quiet --editable '.[perf]'
	$(BIN)/pytest tests/perf --benchmark-only --benchmark-columns=median,iqr,rounds

# Time the hot paths of this tree and of another commit in turn; fails where one became slower (scripts/ratio.py).
BASE ?= origin/main
perf-ratio: develop
	$(BIN)/python scripts/ratio.py "$(BASE)"

# About ten minutes: deliberate mistakes in a copy of the code, each of which a test must find (scripts/mutants.py).
mutants: develop
	$(BIN)/python scripts/mutants.py

# The documentation site, in docs/_site; every warning is an error, such as a link that leads nowhere.
docs: .venv/documented
	$(BIN)/python -m sphinx -b html -W --keep-going --fresh-env --quiet docs docs/_site

.venv/documented: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@ .venv/installed

# Write the figures and the reference of docs/ again, from formulas and from the code.
reference: install
	$(BIN)/python scripts/docs_figures.py
	$(BIN)/python scripts/docs_reference.py

# Write docs/fidelity.md again: the papers' values beside those of the code.
fidelity: develop
	$(BIN)/python scripts/fidelity.py

# A few minutes, Linux only: memory over five million votes, and ten thousand records resumed again and again.
soak: develop
	$(BIN)/python scripts/soak.py --out reports/soak
