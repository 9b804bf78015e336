# The verbs of this project. `make` alone lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
SECTION ?= all
COMPOSE ?= docker compose
PROFILES ?=

.PHONY: help serve test check bench prove lint up clean

help:
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

# The stamp is newer than the lock once everything in it is installed.
.venv/.installed: constraints.txt pyproject.toml docker/install
	PYTHON=$(PYTHON) docker/install .venv
	@touch $@

serve: .venv/.installed ## server on 127.0.0.1:8000 and a trainer worker beside it
	@exec $(BIN)/antefix serve --worker

test: .venv/.installed ## everything that proves correctness
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: .venv/.installed ## lint and the fast tests
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

lint: .venv/.installed ## format, ruff, mypy, the import rules and README's figures
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache | tail -n +1
	$(BIN)/python -m tests.bench.figures --check

bench: .venv/.installed ## measurements beside what a user would pick instead (SECTION=…)
	$(BIN)/python -m tests.bench $(SECTION)

prove: .venv/.installed ## a long proof: NAME=model, prefixes, tables, inspect, soak, users, paper, summarise, kill-worker, kill-store, concurrent-store, store-costs, faults, monitoring, compose, ray
	$(BIN)/python -m tests.prove $(NAME)

up: ## Redis, server and trainer by docker compose, and the first API key; PROFILES=gpu,monitoring,edge, COMPOSE=…
	@COMPOSE="$(COMPOSE)" PROFILES="$(PROFILES)" docker/up

clean: ## removes the environment, not the store
	rm -rf .venv
