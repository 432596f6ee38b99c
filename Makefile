# make quickstart    set up .venv and train the carry task
# make test          set up .venv and run the tests       make test K=hooks   only those whose name matches
# make check         ruff and the strict type checker
# make bench         the benchmarks of the documentation, with ratios
# make conformance   real SGLang in .venv-sglang (3.3 GB, once): the engine tests against it, with a result file
# make base          train the base models of the examples anew

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
VENV_SGLANG := .venv-sglang
CONFORMANCE := tests/conformance
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
K ?=
PYTEST_ARGS := $(if $(K),-k "$(K)") $(if $(SLOW),,-m "not slow")
# Without K, files run in two processes of one thread each. Together in one run those of the plug points, the last of
# which asks what the others have called.
WORKERS ?= 2
TOGETHER := tests/hooks

.PHONY: quickstart test check bench conformance base clean

quickstart: $(INSTALLED)
	$(BIN)/miles train --config examples/quickstart/carry.yaml

test: $(INSTALLED_DEV)
ifdef K
	$(BIN)/python -m pytest $(PYTEST_ARGS)
else
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) -n $(WORKERS) --dist loadfile --ignore=$(TOGETHER)
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(TOGETHER)
endif

check: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED_DEV)
	$(BIN)/python benchmarks/run.py

conformance: $(INSTALLED_DEV) $(VENV_SGLANG)/.installed
	$(BIN)/python $(CONFORMANCE)/run.py --sglang-python $(VENV_SGLANG)/bin/python

base: $(INSTALLED)
	$(BIN)/python examples/quickstart/make_base.py
	$(BIN)/python examples/tiny_tools/make_base.py

clean:
	rm -rf $(VENV) $(VENV_SGLANG) runs build *.egg-info

# Made again only when what it is made from has changed.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "miles needs Python 3.11 or newer; found %s. Set PYTHON=/path/to/python3.11." % sys.version.split()[0])'
	@echo "setting up $(VENV), once: a few minutes, most of them PyTorch"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -e .
	@touch $@

# The tests of an example whose library cannot be installed here are skipped with that reason.
$(INSTALLED_DEV): $(INSTALLED)
	@echo "adding what the tests use"
	@$(PIP) -e '.[dev]'
	@$(PIP) -e '.[examples]' || echo "note: the libraries of some examples could not be installed; their tests are skipped"
	@touch $@

# SGLang and torchvision come without what they require: their GPU libraries. Without a GPU, sglang_cpu.py stands in.
SGLANG_PIP := $(VENV_SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check
$(VENV_SGLANG)/.installed: $(CONFORMANCE)/requirements.txt
	@echo "setting up $(VENV_SGLANG), once: 3.3 GB"
	@$(PYTHON) -m venv $(VENV_SGLANG)
	@$(SGLANG_PIP) torch==2.13.0
	@$(SGLANG_PIP) --no-deps sglang==0.5.23 torchvision==0.28.0
	@$(SGLANG_PIP) -r $(CONFORMANCE)/requirements.txt
	@echo 'import sys; sys.path.append("$(abspath $(CONFORMANCE))"); import sglang_cpu' \
	  > $$($(VENV_SGLANG)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sglang_cpu.pth
	@touch $@
