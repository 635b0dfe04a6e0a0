# Each target first sets up what it needs in .venv, once. Versions are those of requirements.lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable
ARGS ?=
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=300 -p no:cacheprovider

# Freed memory stays with the process: where tensors are large, Linux otherwise takes it back and
# clears it again for each of them. Elsewhere these do nothing.
export MALLOC_MMAP_THRESHOLD_ ?= 4000000000
export MALLOC_TRIM_THRESHOLD_ ?= 4000000000

.PHONY: demo test test-fast notebooks exercises lab lock clean

demo: $(VENV)/core.done  ## sample, label, train with DPO, evaluate: minutes on two cores, no network
	$(BIN)/dpo-mini demo $(ARGS)

test: $(VENV)/test.done  ## everything: the library, then every notebook and solution
	$(BIN)/python -m pytest $(ARGS)
	$(BIN)/python -m pytest $(NBVAL) notebooks
	DPO_MINI_CHECKS=strict DPO_MINI_PROGRESS=$(CURDIR)/$(VENV)/progress.json $(BIN)/python -m pytest $(NBVAL) solutions

test-fast: $(VENV)/test.done  ## what takes seconds
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

lab: $(VENV)/lab.done  ## the course in JupyterLab
	$(BIN)/jupyter lab $(ARGS) notebooks/00_start_here.ipynb

notebooks: $(VENV)/test.done  ## execute again, and store, the notebooks whose code changed
	$(BIN)/python -m dpo_mini.course.execute notebooks $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "dpo_mini needs Python 3.10 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/core.done: $(VENV)/bin/python requirements.lock pyproject.toml
	@echo "Setting up .venv (once; torch is a large download)"
	$(INSTALL) .
	@touch $@

$(VENV)/lab.done: $(VENV)/core.done
	$(INSTALL) '.[lab]'
	@touch $@

$(VENV)/test.done: $(VENV)/core.done
	$(INSTALL) '.[test]'
	@touch $@

exercises: $(VENV)/test.done  ## write exercises/ and the kill matrix from solutions/
	$(BIN)/python -m dpo_mini.course.exercises
	$(BIN)/python -m dpo_mini.course.checks.matrix

lock:  ## pin what a fresh environment with every extra gets
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet torch==2.13.0
	.venv-lock/bin/python -m pip install --quiet '.[test]'
	.venv-lock/bin/python -m pip freeze | grep -v '^dpo-mini' | sed 's/+cpu$$//' > requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf $(VENV) runs build dist *.egg-info
