# What there is to do here; `make` or `make help` lists it. The scripts do the work.
SHELL := /bin/bash
PYTHON := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# One file or two per folder, chosen for what they cover in a second or so each.
FAST := tests/test_architecture.py tests/find/test_contracts.py tests/record/test_truth.py \
	tests/timeline/test_timeline.py tests/read/test_reading_loads.py tests/read/test_reading_export.py \
	tests/read/test_rank_report.py tests/placement/test_placement_properties.py \
	tests/simple/test_simple_profiler.py

.DEFAULT_GOAL := help
.PHONY: help setup lint test-fast test test-versions test-hosts test-vllm test-cuda release-check bench docs

help:  ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup:  ## make .venv with everything that development needs
	bash scripts/setup.sh --tests

lint:  ## ruff, its formatter and mypy
	ruff check . && ruff format --check . && mypy moe_trace

test-fast:  ## the tests to run after every change: under a minute
	$(PYTHON) -m pytest -q $(FAST)

test:  ## every check of the project: lint, then all tests, several at once
	bash scripts/test.sh

test-versions:  ## the truth-first tests on all admitted versions; writes docs/versions.md
	bash scripts/test_versions.sh

test-hosts:  ## the routers of torchtitan, OLMo-core, Megatron-core and others; writes docs/frameworks.md
	$(PYTHON) scripts/test_hosts.py

test-vllm:  ## the real vLLM engine on a CPU, in an environment of its own (3 GB, cached)
	bash scripts/test_vllm.sh

release-check:  ## wheel and sdist, used as a stranger would, in a clean environment
	$(PYTHON) scripts/check_release.py

test-cuda:  ## the tests that need a GPU, on this machine's
	$(PYTHON) -m pytest -q -m cuda tests

bench:  ## what reading and merging cost, as ratios within one run
	$(PYTHON) scripts/bench_calls.py
	$(PYTHON) scripts/bench_merge.py
	$(PYTHON) scripts/bench_overhead.py

docs:  ## the documentation as a site, into build/site; a broken link fails
	$(PYTHON) -m mkdocs build --strict --config-file .mkdocs.yml
