# Each target first sets up what it needs in .venv, once. Versions are those of requirements.lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# Without a network: make lab WHEELHOUSE=wheelhouse, after `make wheelhouse` on a machine with one.
WHEELHOUSE ?=
FROM = $(if $(WHEELHOUSE),--no-index --find-links $(WHEELHOUSE))
QUIET := --quiet --disable-pip-version-check
INSTALL = $(BIN)/python -m pip install $(QUIET) $(FROM) --constraint requirements.lock --editable

# On Linux the package index has torch with 6 GB of CUDA libraries. Where there is no NVIDIA GPU,
# torch's own index has a build without them. `make lab GPU=` and `make lab GPU=yes` overrule this.
GPU ?= $(shell nvidia-smi -L 2> /dev/null)
TORCH := $(shell sed -n 's/^torch==/torch==/p' requirements.lock)
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
WITHOUT_CUDA := $(if $(GPU)$(WHEELHOUSE),,$(filter Linux,$(shell uname -s)))
# $(call cpu_torch,pip command,version): one try of at most 15 seconds; failing is no error.
cpu_torch = $(if $(WITHOUT_CUDA),$(1) $(QUIET) --no-deps --retries 0 --timeout 15 \
    --index-url $(CPU_INDEX) $(2) 2> /dev/null || \
    echo "No CPU build of torch from $(CPU_INDEX): the package index has a larger one.",:)

# Both cores, one thread each; a notebook's cells stay together. A machine five times slower passes.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS)
TESTS := --dist loadgroup
NBVAL := -p no:cacheprovider --dist loadfile --nbval-lax --nbval-current-env \
    --nbval-cell-timeout=1500

# Freed memory stays with the process: where tensors are large, Linux otherwise takes it back and
# clears it again for each of them. Elsewhere these do nothing.
export MALLOC_MMAP_THRESHOLD_ ?= 4000000000
export MALLOC_TRIM_THRESHOLD_ ?= 4000000000

.PHONY: demo demo-real test test-fast test-lowest notebooks exercises workshop lab site lock wheelhouse clean

demo: $(VENV)/core.done  ## sample, label, train with DPO, evaluate: minutes on two cores, no network
	$(BIN)/dpo-mini demo $(ARGS)

demo-real: $(VENV)/core.done  ## the same with SmolLM2-135M, which is downloaded once (93 MB)
	$(BIN)/dpo-mini fetch smollm2
	$(BIN)/dpo-mini demo --model smollm2 --output runs/demo-real $(ARGS)

lab: $(VENV)/lab.done  ## the course in JupyterLab
	$(BIN)/jupyter lab $(ARGS) notebooks/00_start_here.ipynb

test: $(VENV)/test.done  ## everything: the library, then every notebook and solution
	$(PYTEST) $(TESTS) $(ARGS)
	DPO_MINI_CHECKS=strict DPO_MINI_PROGRESS=$(CURDIR)/$(VENV)/progress.json \
	    $(PYTEST) $(NBVAL) notebooks solutions

test-fast: $(VENV)/test.done  ## what takes seconds
	$(PYTEST) $(TESTS) -m "not slow" $(ARGS)

notebooks: $(VENV)/test.done  ## execute again, and store, the notebooks whose code changed
	$(BIN)/python -m dpo_mini.course.execute notebooks $(ARGS)

exercises: $(VENV)/test.done  ## write exercises/ and the kill matrix from solutions/
	$(BIN)/python -m dpo_mini.course.exercises
	$(BIN)/python -m dpo_mini.course.checks.matrix

FORM ?= 3h
workshop: $(VENV)/lab.done  ## two archives in dist/workshop; FORM=1h, 3h or 2d
	$(BIN)/python -m dpo_mini.course.workshop.archives $(FORM)

site: $(VENV)/site.done  ## the web edition in site/_build/html, from the stored outputs
	$(BIN)/python site/build.py $(ARGS)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "dpo_mini needs Python 3.10 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/core.done: $(BIN)/python requirements.lock pyproject.toml
	@echo "Setting up .venv (once; torch is a large download)"
	@$(call cpu_torch,$(BIN)/python -m pip install,$(TORCH))
	$(INSTALL) .
	@touch $@

$(VENV)/lab.done: $(VENV)/core.done
	$(INSTALL) '.[lab]'
	@touch $@

$(VENV)/site.done: $(VENV)/core.done
	$(INSTALL) '.[site]'
	@touch $@

$(VENV)/test.done: $(VENV)/core.done
	$(INSTALL) '.[test]'
	@touch $@

wheelhouse: $(BIN)/python  ## download once what this Python on this system needs; then no network
	mkdir -p wheelhouse
	@$(call cpu_torch,$(BIN)/python -m pip download --dest wheelhouse,$(TORCH))
	$(BIN)/python -m pip wheel $(QUIET) --find-links wheelhouse --wheel-dir wheelhouse \
	    --constraint requirements.lock setuptools '.[lab,lora]'

# torch's CUDA libraries are left out: torch names their versions itself, and a CPU build has none.
NO_CUDA := grep -vE '^(cuda|nvidia)-|^triton=='
UV = $(BIN)/python -m uv pip compile --quiet --extra test --no-header --no-annotate

lock: $(VENV)/test.done  ## pin what every Python and system gets; ARGS=--upgrade takes the newest
	echo $(TORCH) | $(UV) --universal --python-version 3.10 --constraint - $(ARGS) \
	    --output-file requirements.lock pyproject.toml
	$(NO_CUDA) requirements.lock > requirements.lock.partial
	mv requirements.lock.partial requirements.lock

# TRL is left out: it is pinned, and would raise what it needs. LOWEST_TORCH=torch==2.13.0, say,
# takes another torch than the lowest.
LOWEST_TORCH ?=
LOWEST := .venv-lowest

test-lowest: $(VENV)/test.done  ## the fast tests with the lowest versions that pyproject.toml admits
	rm -rf $(LOWEST) && $(PYTHON) -m venv $(LOWEST)
	printf 'trl; python_version < "3"\n$(LOWEST_TORCH)\n' > $(LOWEST)/overrides.txt
	$(UV) --resolution lowest-direct --only-binary :all: --python $(LOWEST)/bin/python \
	    --override $(LOWEST)/overrides.txt pyproject.toml | $(NO_CUDA) > $(LOWEST)/requirements.txt
	@$(call cpu_torch,$(LOWEST)/bin/python -m pip install,$$(grep ^torch== $(LOWEST)/requirements.txt))
	$(LOWEST)/bin/python -m pip install $(QUIET) --requirement $(LOWEST)/requirements.txt --editable .
	$(subst $(BIN),$(LOWEST)/bin,$(PYTEST)) $(TESTS) -m "not slow and not lock" $(ARGS)

clean:
	rm -rf $(VENV) $(LOWEST) wheelhouse runs build dist site/_build *.egg-info
