# `make help` lists the targets. Every path here is relative, so that a clone whose own path holds
# spaces works too; nothing needs the virtual environment to be activated.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export PYTHONHASHSEED := 0
NOTEBOOK_FOLDER := notebooks
PORT ?= 8000
DEVICE ?= cuda
# CHAPTERS="01 06" narrows `notebooks`, `nbval` and `test-gpu`; empty means all.
CHAPTERS ?=
CHOSEN = $(if $(CHAPTERS),$(foreach n,$(CHAPTERS),$(NOTEBOOK_FOLDER)/$(n)_*.ipynb),$(NOTEBOOK_FOLDER))
# Where PyTorch comes from; empty means pip's own index. PyTorch's are
#   https://download.pytorch.org/whl/cpu      no GPU: spares gigabytes of CUDA
#   https://download.pytorch.org/whl/cu130    CUDA 13.0
# It is kept in .venv, so that it need be given only once.
INDEX_NOW := $(shell cat .venv/.torch-index 2>/dev/null)
TORCH_INDEX ?= $(INDEX_NOW)

ifdef NO_SETUP
# An environment that is already there: nothing is installed, cnfkit is found through the path.
PYTHON ?= python3
PY := $(PYTHON)
SETUP :=
NBVAL_KERNEL := --nbval-current-env
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
# The lock is for Python 3.11, so look for that one alone.
IS_311 := import sys; sys.exit(sys.version_info[:2] != (3, 11))
PYTHON ?= $(shell for p in python3.11 python3; do \
	if $$p -c '$(IS_311)' 2>/dev/null; then echo $$p; break; fi; done)
PY := .venv/bin/python
SETUP := .venv/.installed
NBVAL_KERNEL :=
# Python compiles what it imports, when it does: leaving that to it halves the time of the set-up.
PIP_INSTALL := .venv/bin/python -m pip install -qq --disable-pip-version-check --no-compile
# Another TORCH_INDEX than the installed one means another build of PyTorch.
ifneq ($(TORCH_INDEX),$(INDEX_NOW))
.PHONY: .venv/.installed
OTHER_TORCH := yes
endif
endif

##@ Set-up

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^##@ /{printf "\n%s\n", substr($$0, 5)} \
		/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@printf '%s\n' '' 'Variables' \
		'  PYTHON=python3.11         the interpreter that .venv is made from' \
		'  TORCH_INDEX=URL           where PyTorch comes from: https://download.pytorch.org/whl/cpu without a GPU' \
		'  CHAPTERS="01 06"          only these, in notebooks, nbval and test-gpu' \
		'  DEVICE=cuda  PORT=8000    for test-gpu; for serve' \
		'  NO_SETUP=1 PYTHON=python3 use an environment that is already there'

.PHONY: setup
setup: $(SETUP) ## make .venv from requirements.lock (the other targets do this by themselves)

# The stamp comes last: an interrupted set-up leaves none and is taken up again.
.venv/.installed: requirements.lock pyproject.toml
	@rm -f $@
	@if [ -z "$(PYTHON)" ]; then \
		echo 'make: Python 3.11 is needed and neither python3.11 nor python3 is it.' >&2; \
		echo '      Install it, or say where it is: make setup PYTHON=/path/to/python3.11' >&2; exit 1; fi
	@if ! "$(PYTHON)" -c '' 2>/dev/null; then echo 'make: PYTHON=$(PYTHON) does not run.' >&2; exit 1; fi
	@if ! "$(PYTHON)" -c '$(IS_311)'; then \
		echo "make: PYTHON=$(PYTHON) is $$("$(PYTHON)" -V), but requirements.lock is for Python 3.11." >&2; exit 1; fi
	@if ! { $(PY) -c '$(IS_311)' && $(PY) -m pip --version; } >/dev/null 2>&1; then \
		echo 'Making .venv'; "$(PYTHON)" -m venv --clear .venv; fi
	@if [ -n "$(OTHER_TORCH)" ]; then $(PY) -m pip uninstall -qq --yes torch; fi
	@echo 'Installing PyTorch $(if $(TORCH_INDEX),from $(TORCH_INDEX))'
	@$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") \
		"$$(grep '^torch==' requirements.lock)"
	@echo 'Installing the rest of requirements.lock'
	@$(PIP_INSTALL) --requirement requirements.lock
	@$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@echo '$(TORCH_INDEX)' > .venv/.torch-index
	@touch $@

##@ Read and run

.PHONY: book
book: $(SETUP) ## build the book into _build/html
	@$(PY) -m sphinx -q -c book -b html . _build/html
	@$(PY) -c 'import pathlib; print("The book:", pathlib.Path("_build/html/index.html").resolve().as_uri())'

.PHONY: serve
serve: book ## build the book and serve it on this machine alone, at PORT
	@echo 'Serving on http://127.0.0.1:$(PORT)/ until Ctrl-C'
	@$(PY) -m http.server --bind 127.0.0.1 --directory _build/html "$(PORT)" 2>/dev/null

# A cloned notebook is not trusted: until its cells are run, JupyterLab would strip what moves in it.
.PHONY: lab
lab: $(SETUP) ## open JupyterLab on the notebooks, trusted
	@$(PY) -m nbformat.sign $(NOTEBOOK_FOLDER)/*.ipynb
	@$(PY) -m jupyterlab --notebook-dir=. $(LAB_OPTIONS) --LabApp.default_url=/lab/tree/$(NOTEBOOK_FOLDER)

.PHONY: notebooks
notebooks: $(SETUP) ## execute the notebooks again from their text twins (CHAPTERS="01 06": only these)
	@$(PY) book/execute.py -j 2 $(CHAPTERS)

.PHONY: pages
pages: $(SETUP) ## run the code of the book's pages, and write what it prints
	@$(PY) book/pages.py

.PHONY: card
card: $(SETUP) ## list the published weights again, after a chapter was retrained
	@$(PY) book/make_card.py

.PHONY: picture
picture: $(SETUP) ## make README's moving picture again
	@$(PY) book/make_picture.py

##@ Check

# Each part alone is a target; all of them run even when one fails, and their times are shown.
.PHONY: test
test: $(SETUP) ## lint, unit, pairs, nbval and book-strict, timed against the budget of 25 minutes
	@$(PY) tests/run_parts.py --budget-minutes 25 --make "$(MAKE)" lint unit pairs nbval book-strict

.PHONY: lint
lint: $(SETUP) ## ruff on library, tests, book and notebooks
	@$(PY) -m ruff check .

.PHONY: unit
unit: $(SETUP) ## pytest on cnfkit, its doctests included
	@$(PY) -m pytest -q -n 2 --dist loadscope tests cnfkit \
		--ignore=tests/test_notebooks.py --ignore=tests/test_book.py

.PHONY: pairs
pairs: $(SETUP) ## each notebook against its text twin and the rules of the course
	@$(PY) -m pytest -q tests/test_notebooks.py

# loadscope keeps the cells of one notebook on one worker.
.PHONY: nbval
nbval: $(SETUP) ## every notebook executed and compared with its committed outputs
	@$(PY) -m pytest -q -n 2 --dist loadscope --nbval $(NBVAL_KERNEL) $(CHOSEN)

.PHONY: book-strict
book-strict: $(SETUP) ## the book built with warnings as errors, and its pages looked through
	@$(PY) -m pytest -q tests/test_book.py

.PHONY: test-gpu
test-gpu: $(SETUP) ## the notebooks on DEVICE, chapter by chapter; their checks judge
	@$(PY) tests/run_on_device.py --device "$(DEVICE)" $(CHAPTERS)

.PHONY: clean
clean: ## remove what was built; .venv stays
	@rm -rf _build build *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -path './.venv*' -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +

##@ Measure

.PHONY: timings
timings: $(SETUP) ## how long each notebook takes, for the page of run times (CHAPTERS="01 06": only these)
	@$(PY) book/execute.py --timings $(CHAPTERS)

# The peers live in an environment of their own, beside a cnfkit that is this one.
.PHONY: bench
bench: $(SETUP) ## cnfkit beside its peers, in about 10 minutes: a table, and a page of the book (DEVICE=cuda: there)
	@benchmarks/environment.sh
	@.venv-bench/bin/python benchmarks/bench.py $(if $(filter command%,$(origin DEVICE)),--device $(DEVICE))

.PHONY: bench-train
bench-train: $(SETUP) ## by the clock, to a given likelihood: about an hour, and to be interrupted and resumed
	@benchmarks/environment.sh
	@.venv-bench/bin/python benchmarks/train.py
