# Every target starts from a bare python3 (3.11 or newer) and builds .venv on first use; later runs reuse it.
#
# torch comes first and alone, so that a machine with its own torch builds (CPU-only, another CUDA) only has to point
# pip at them, with PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL; everything else then accepts the torch that is there.

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/ready
PIP := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --constraint constraints.txt

# Workers take tests from each other, so that no long one is left to the end; each computes on one core.
TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=10

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-nightly lint bench docs docs-pages

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 22

venv: $(STAMP) ## Build the environment in .venv

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"zo2trl needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}. Name another one: make PYTHON=python3.12 ...")'
	@rm -f $(STAMP)
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[demo,test,dev]'
	@touch $(STAMP)

demo: $(STAMP) ## Pretrain a small OPT, fine-tune it out of three tiers, check the result (CPU, offline)
	$(BIN)/python -m recipes.sentiment_demo

test: $(STAMP) ## Run the tests that need neither a GPU nor patience
	$(TESTS) -m "not gpu and not nightly"

test-nightly: $(STAMP) ## Run the long tests
	$(TESTS) -m "nightly and not gpu" --timeout 7200

lint: $(STAMP) ## Style and types
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP) ## Measure what the README claims, one script after the other
	@set -e; for module in $(subst /,.,$(basename $(sort $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))))); do \
		echo "== $$module"; $(BIN)/python -m $$module </dev/null; done

docs: $(STAMP) ## Build the site in site/; its tools are installed into .venv on first use
	@$(BIN)/python -c 'import mkdocs, material, mkdocstrings' 2>/dev/null || $(PIP) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict  # with --quiet, it would not count warnings

docs-pages: $(STAMP) ## Write the pages of docs/ that are made from the code
	$(BIN)/python -m docs.generate
