# `make` prints what there is to make. Every target uses the environment in .venv, which `make setup` makes.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --durations=15

.DEFAULT_GOAL := help
.PHONY: help setup try demo shipped-model scores long-data test test-fast test-slow test-slurm test-all test-harness lint format docs bench gpu gpu-wheels clean

help: ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{printf "make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv with emma-train and emma-data in it (PYTHON=... chooses another Python 3.11+)

# torch goes first, because an open range would take the newest release with gigabytes of CUDA packages. A machine without
# an NVIDIA GPU asks for the CPU build, which sorts above the plain version wherever pip is told to look for it.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "setup: making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "setup: Python 3.11 or newer is needed; set PYTHON=")'
	@if $(BIN)/python -m pip show torch 2>/dev/null | grep -q '^Version: $(TORCH)\(+.*\)\?$$'; then \
	  echo "setup: torch $(TORCH) is there"; \
	elif command -v nvidia-smi >/dev/null || [ -e /dev/nvidia0 ] || [ "$$(uname)" != Linux ]; then \
	  echo "setup: installing torch $(TORCH)"; $(PIP) install -c constraints.txt torch==$(TORCH); \
	elif echo "setup: no NVIDIA GPU here, looking for torch $(TORCH)+cpu"; \
	  $(PIP) install -c constraints.txt torch==$(TORCH)+cpu 2>/dev/null; then :; \
	else \
	  echo "setup: no CPU build found, installing torch $(TORCH) with its CUDA packages (gigabytes)." \
	    "For the small one, stop and set PIP_EXTRA_INDEX_URL to PyTorch's CPU package index."; \
	  $(PIP) install -c constraints.txt torch==$(TORCH); \
	fi
	@echo "setup: installing emma-train and what it needs"
	@$(PIP) install -c constraints.txt -e ".[test]"
	@touch $@
	@echo "setup: done; try $(BIN)/emma-train doctor"

try: setup ## draw, edit and answer with the model in recipes/tiny-long/model
	$(BIN)/emma-train generate tiny --task t2i --prompt "a flat dog face on a blue background" --out runs/try
	$(BIN)/emma-train generate tiny --task it2i --image docs/images/cat.png --prompt "make the background pink" --out runs/try
	$(BIN)/emma-train generate tiny --task i2t --image docs/images/cat.png --prompt "What is this?"

TINY := recipes/tiny/assets
DEMO := runs/demo
DEMO_DATA := runs/emoji
DEMO_START := runs/tiny-initial

# The same drawings as in the set of the repository, in four times as many images. DC-AE never trains, so its latents are
# computed once. Stage 0 starts from trained parts, as in the paper. The pipeline goes on where it stopped when make demo
# is run again.
demo: setup ## train every stage on real images with two processes and write runs/demo/report.html
	@test -e $(DEMO_DATA)/heldout_concepts/manifest.json || rm -rf $(DEMO_DATA)
	@test -e $(DEMO_DATA) || $(BIN)/emma-data import fluent-emoji $(DEMO_DATA) --world tiny --samples 3000 2500 700 \
	  --package $(TINY)/emoji/drawings.tgz
	$(BIN)/emma-data cache-latents $(DEMO_DATA)/train --autoencoder $(TINY)/autoencoder --side 128
	@test -e $(DEMO_START) || $(BIN)/emma-train import $(DEMO_START) --llm $(TINY)/qwen3 --vision $(TINY)/siglip2 \
	  --autoencoder $(TINY)/autoencoder
	$(BIN)/emma-train launch recipes/tiny/pipeline.yaml --on torchrun --nproc 2 run.name=demo \
	  data.sources[0].path=$(DEMO_DATA)/train init.from=$(DEMO_START)
	$(BIN)/emma-train evaluate $(DEMO) --data $(DEMO_DATA)
	$(BIN)/emma-train report $(DEMO)
	@echo "demo: done; open $(DEMO)/report.html in a browser"

LONG := recipes/tiny-long
LONG_DATA := runs/emoji-long

shipped-model: long-data ## train the model in recipes/tiny-long/model again (an hour of 2 cores); goes on where it stopped
	$(BIN)/emma-data cache-latents $(LONG_DATA)/train --autoencoder $(TINY)/autoencoder --side 128
	$(BIN)/emma-train launch $(LONG)/pipeline.yaml --on torchrun --nproc 2
	$(BIN)/emma-train export runs/tiny-long $(LONG)/model --precision bf16

scores: long-data ## score the model in recipes/tiny-long/model and compare with recipes/tiny-long/scores.json
	@mkdir -p runs/scores
	$(BIN)/emma-train evaluate $(LONG)/model --data $(LONG_DATA) --limit 0 --out runs/scores/scores.json \
	  --compare $(LONG)/scores.json

long-data: setup
	@test -e $(LONG_DATA)/heldout_concepts/manifest.json || rm -rf $(LONG_DATA)
	@test -e $(LONG_DATA) || $(BIN)/emma-data import fluent-emoji $(LONG_DATA) --world tiny --samples 20000 12000 1059 \
	  --package $(TINY)/emoji/drawings.tgz

test: setup ## the tests that need no GPU and little time
	$(PYTEST) --dist loadfile -m "not slow and not gpu"

test-fast: setup ## the unit tests alone, for the inner loop
	$(PYTEST) --dist worksteal -m "not slow and not gpu and not seconds" tests/unit

test-slow: setup ## the tests that take longer; those that need a GPU skip themselves without one
	$(PYTEST) --dist loadfile -m "(slow or gpu) and not slurm"

test-slurm: setup ## launch on a real SLURM of two nodes on this host; needs root, slurm-wlm and munge (apt)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -v -rs tests/integration/test_slurm.py

test-all: test test-slow ## every test

MODEL ?= $(DEMO)/stage3

# About 1.4 GB of packages beside .venv, on top of it. MODEL is a trained tiny model, by default that of `make demo`.
test-harness: setup ## lmms-eval and VLMEvalKit end to end on local questions with the model of make demo (MODEL=)
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python tests/harness/run.py $(MODEL) --out build/harness

lint: setup ## ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## the documentation as a web site in site/
	@$(BIN)/python -c 'import material, mkdocstrings' 2>/dev/null || $(PIP) install -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: setup ## every benchmark in tests/bench
	@for bench in $(sort $(wildcard tests/bench/[a-z]*.py)); do \
	  echo "bench: $$bench"; $(BIN)/python "$$bench" || exit 1; \
	done

PART ?= tests
OUT ?= runs/gpu$(if $(DRY),-dry)
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
GPU_tests := tests/gpu/run_tests.py
GPU_step := tests/gpu/step.py
GPU_stages := tests/gpu/step.py --only one-card from-shards stage0 stage2 stage3 stage4_expert stage4_router --table stages
GPU_baselines := tests/gpu/step.py --only one-card tokenwise tokenwise-flex padded --table baselines
GPU_attention := tests/bench/attention.py --packs mixed --tokens 8192 16384 32768
# With DRY=1 the same scripts prove themselves on a CPU with tiny sizes, where compiling would take an hour, so nothing is
# compiled. Tests that need a card skip themselves there.
DRY_step := --device cpu --tiny --minutes 55
DRY_stages := $(DRY_step)
DRY_baselines := $(DRY_step)
DRY_attention := --tokens 512 1024 --side 4 --heads 4 --kv-heads 2 --dim 32

# Without `make setup`: a machine with a GPU has a torch of its own. Each part ends within nine minutes.
gpu: ## on an NVIDIA GPU: its tests; with PART=step, stages, baselines or attention the speed of these; results go to runs/gpu (OUT=); DRY=1 tries it on a CPU
	@$(if $(GPU_$(PART)),,echo "gpu: PART is $(PART); use tests, step, stages, baselines or attention"; exit 2)
	PYTHONPATH=.:$$PYTHONPATH $(if $(DRY),TORCH_COMPILE_DISABLE=1) timeout $(if $(DRY),3600,540) $(GPU_PYTHON) $(GPU_$(PART)) $(if $(DRY),$(DRY_$(PART))) --out $(OUT)

WHEELS ?= -r tests/gpu/wheels.txt
gpu-wheels: ## what make gpu needs on a machine without a network, as wheels for Python 3.12 on x86-64 in .whl/
	python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  $(foreach n,39 35 34 31 28 27 24 17,--platform manylinux_2_$(n)_x86_64) --platform manylinux2014_x86_64 \
	  --platform manylinux1_x86_64 -d .whl $(WHEELS)

clean: ## remove caches and build leftovers; runs/ and .venv stay
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
