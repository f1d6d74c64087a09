# Each verb sets up what it needs; a second run finds that done and costs a moment.
# ARGS reaches the command: make test ARGS='-k ledger -x'
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup default-model demo test check sim mutants chaos soak bench bench-quick clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s  %s\n", $$1, $$2 }' Makefile

setup: ## make .venv with everything that runs and tests need
	@scripts/setup

default-model: setup
	@.venv/bin/python -m kevlarflow.default_model >/dev/null

demo: default-model ## kill a node in mid-stream and watch the streams go on
	.venv/bin/kevlarflow demo $(ARGS)

test: default-model ## run the tests
	.venv/bin/pytest $(ARGS)

check: setup ## lint, formatting, types, import layers
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports

sim: setup ## the protocol under drawn faults, in a simulator; make sim SEED=7 repeats one
	.venv/bin/python -m kevlarflow.sim $(if $(SEED),--seed $(SEED)) $(ARGS)

mutants: setup ## plant protocol bugs and see that each is found
	.venv/bin/python scripts/mutants.py $(ARGS)

chaos: default-model ## hurt real clusters as the shipped scenarios say, and check what has to hold
	.venv/bin/kevlarflow chaos --all $(ARGS)

soak: default-model ## every fault in every phase on one cluster, FAULTS rounds; writes a report
	.venv/bin/kevlarflow soak --faults $(or $(FAULTS),20) $(ARGS)

bench: default-model ## measure against stock vLLM, side by side
	.venv/bin/kevlarflow bench $(ARGS)

bench-quick: default-model ## lose a node, beside stock vLLM behind a router; under 10 minutes
	.venv/bin/kevlarflow bench run quick $(ARGS)

clean: ## remove caches and build leftovers; keeps .venv and the model cache
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +
