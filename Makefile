PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ALL    := $(VENV)/.installed-all
OTHERS := .venv-foreign
FOREIGN := $(OTHERS)/.installed
PEERS  := $(patsubst experiments/peers/%.txt,.venv-peers/%/.installed,$(wildcard experiments/peers/*.txt))
SITE   := $(VENV)/.installed-site

# Tests start hundreds of processes: what they import is compiled once, also where the surroundings forbid to keep it.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-full test-crash test-ranks test-foreign bench bench-quick peers nox docs-test site check check-style check-types check-examples format matrix sweep clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

install: $(STAMP) ## make .venv with all that tests and benchmarks need

$(STAMP): pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	# what is imported is compiled when it is: most of what is installed never is
	$(BIN)/pip install --quiet --no-compile -c constraints-cpu.txt torch
	$(BIN)/pip install --quiet --no-compile -c constraints-cpu.txt -e '.[all,dev]'
	@touch $@

$(ALL): $(STAMP)
	$(BIN)/pip install --quiet --no-compile -c constraints-cpu.txt -e '.[all,all-runtimes,dev]'
	$(BIN)/pip check
	@touch $@

demo: install ## train, prune, quantize, export and prove a model on real images, into outputs/demo
	$(BIN)/lightning-compress demo

test: install ## run all tests; prints the behaviour matrix
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup

test-all: $(ALL) ## install every runtime, and run the tests of the files in each of them; nothing is skipped
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup -m runtimes --runtimes

test-full: install ## run every test, every cell of the behaviour matrix and every kind of run, which make test thins; nightly
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup --full

test-crash: install ## kill runs by SIGKILL at every kind of place, start them again, and compare; nightly
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.crash

test-ranks: install ## run every callback in many processes, and runs of which one process dies; prints a table
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.behaviour.many

$(FOREIGN): experiments/foreign/requirements.txt constraints-cpu.txt
	$(PYTHON) -m venv $(OTHERS)
	$(OTHERS)/bin/pip install --quiet --no-compile -c constraints-cpu.txt torch
	# all that is needed is named there, in versions that ran together
	$(OTHERS)/bin/pip install --quiet --no-compile --no-deps -r experiments/foreign/requirements.txt
	$(OTHERS)/bin/pip install --quiet --no-compile --no-deps -e .
	@touch $@

test-foreign: $(FOREIGN) ## try every callback on models of other packages; writes docs/foreign.md and support.md; what is unchanged is not run again
	OMP_NUM_THREADS=1 $(OTHERS)/bin/python -m experiments.bench coverage \
		--folder outputs/foreign --json experiments/results/foreign.json --write docs/foreign.md
	$(OTHERS)/bin/python -m experiments.foreign.support

PICTURES := outputs/data/node_modules/.package-lock.json
EMOJI    := $(foreach vendor,google apple facebook twitter,emoji-datasource-$(vendor)@16.0.0)

$(PICTURES):
	npm install --silent --prefix outputs/data $(EMOJI)

bench: install peers $(PICTURES) ## run what is missing of the benchmark (hours; it can be stopped), and write its tables
	$(BIN)/python -m experiments.bench proof --more-seeds
	$(BIN)/python -m experiments.bench report

bench-quick: install ## run the benchmark's whole way on one small task, in less than two minutes
	$(BIN)/python -m experiments.bench quick

peers: $(PEERS) ## make the environments of the tools that ours is compared with

.venv-peers/%/.installed: experiments/peers/%.txt constraints-cpu.txt
	$(PYTHON) -m venv .venv-peers/$*
	.venv-peers/$*/bin/pip install --quiet --no-compile -c constraints-cpu.txt torch
	.venv-peers/$*/bin/pip install --quiet --no-compile -c constraints-cpu.txt -r $<
	.venv-peers/$*/bin/pip install --quiet --no-deps -e .
	@touch $@

nox: ## run unit tests and the demo in Python 3.10 to 3.13, with the lowest and the newest dependencies; nightly
	$(PYTHON) -m venv .nox/tool
	.nox/tool/bin/pip install --quiet 'nox>=2025.2' uv
	PATH=$(CURDIR)/.nox/tool/bin:$$PATH OMP_NUM_THREADS=1 .nox/tool/bin/nox --envdir .nox

docs-test: $(SITE) $(FOREIGN) ## run the code of README, guides, cards and tutorials, and the scripts of docs/your-model; prints their seconds
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup tests/test_documents.py tests/test_your_model.py
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.tutorials
	OMP_NUM_THREADS=1 $(OTHERS)/bin/python -m experiments.foreign.your_model

$(SITE): $(STAMP)
	$(BIN)/pip install --quiet --no-compile -c constraints-cpu.txt -e '.[all,docs]'
	@touch $@

site: $(SITE) ## build the documentation into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 .ci/joined $(BIN)/mkdocs build --strict --quiet --site-dir $(CURDIR)/site

check: check-style check-types check-examples ## lint, types, architecture, docstring examples, spelling

check-style: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# what is written by a command holds names of other people's modules
	$(BIN)/codespell --skip '.git,.venv,.venv-foreign,.venv-peers,.nox,outputs,multirun,site,*.svg,LICENSE,./experiments/results,./experiments/peers/*.txt,./docs/foreign.md'

check-types: install
	.ci/joined $(BIN)/mypy

check-examples: install
	.ci/joined $(BIN)/lint-imports --no-logo --no-cache
	.ci/joined $(BIN)/pytest -p no:cacheprovider --doctest-modules lightning_compress

format: install ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

matrix: install ## run the behaviour matrix, the pairs of callbacks and the kinds of runs alone
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup tests/behaviour/test_matrix.py \
		tests/behaviour/test_pairs.py
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --full tests/behaviour/test_runs.py

sweep: install ## three sparsities, one table, read back from the offline W&B files
	$(BIN)/lightning-compress -m experiment=mnist_prune_int8 sweep=sparsity hydra/launcher=joblib

clean: ## remove what was made
	rm -rf $(VENV) $(OTHERS) .venv-peers .nox outputs multirun build site *.egg-info
