# The one list of commands: people and CI call the same words. `make` alone prints it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
PY := .venv/bin/python
BIN := .venv/bin
SOURCES := msd loadgen testbed tests scripts
DESTDIR ?=
CONFIRM ?=
# Extra arguments for the command behind a target, e.g. make test ARGS='-k cancel' or make sim ARGS='--seed 7'
ARGS ?=

# vLLM reports usage over the network by default, and one engine's OpenMP threads fight another's on few cores.
export VLLM_NO_USAGE_STATS := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help
help: ## print this list
	@echo "msd: make TARGET"
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ first things

.PHONY: setup
setup: ## make .venv with everything pinned (vLLM for the GPU if there is one, else its CPU build)
	@$(PYTHON) scripts/setup_env.py

.PHONY: testbed
testbed: setup ## derive the INT8 variants of the tiny trained models (seconds)
	@$(PY) -m testbed.int8 --all

.PHONY: demo
demo: setup testbed ## four modes on four live engines, a 30 s bursty load, a table to read
	@$(BIN)/msd demo $(ARGS)

##@ checks and tests

.PHONY: test
test: setup testbed ## all tests that need no GPU, real vLLM engines included
	@echo "test: unit, property, contract, simulation, then end to end on real vLLM engines (each start takes 20-50 s)"
	@$(PY) -m pytest -m "not gpu and not bench and not crash" --durations=15 --durations-min=5 tests $(ARGS)

.PHONY: test-fast
test-fast: setup ## unit, property and contract tests without vLLM (seconds)
	@$(PY) -m pytest -q -m "not gpu and not bench and not crash and not e2e and not slow" \
		$(wildcard tests/unit tests/property tests/contract) $(ARGS)

.PHONY: check
check: setup ## format, lint, mypy --strict, import contracts, config reference in step
	@echo "check: ruff format" && $(BIN)/ruff format --check $(SOURCES)
	@echo "check: ruff lint" && $(BIN)/ruff check $(SOURCES)
	@echo "check: mypy --strict" && $(BIN)/mypy
	@echo "check: import contracts" && $(BIN)/lint-imports --no-logo
	@echo "check: docs/reference/config.md" && $(PY) -m msd.config --check-docs docs/reference/config.md

.PHONY: fix
fix: setup ## format, and what the linter can mend by itself
	@$(BIN)/ruff check --fix $(SOURCES) || true
	@$(BIN)/ruff format $(SOURCES)

.PHONY: e2e
e2e: setup testbed ## only the tests on real vLLM engines and real sockets
	@$(PY) -m pytest -m "e2e and not gpu" --durations=10 tests $(ARGS)

# An environment that has vLLM already (an air-gapped GPU host) is used as it is; else .venv is made.
GPU_PY = $$(python3 -c 'import vllm' 2>/dev/null && echo python3 || echo $(PY))
BUDGET_S ?= 540

.PHONY: gpu
gpu: ## on an NVIDIA GPU: profile, gate, deployment families, a burst; call again until all is measured (BUDGET_S=540)
	@nvidia-smi -L >/dev/null 2>&1 || [ -e /dev/nvidia0 ] || \
		{ echo "gpu: no NVIDIA GPU on this machine (nvidia-smi lists none): nothing was run" >&2; exit 75; }
	@python3 -c 'import vllm' 2>/dev/null || $(MAKE) setup
	@$(GPU_PY) -m testbed.int8 --all
	@$(GPU_PY) -m tests.gpu.deployment --budget-s $(BUDGET_S) $(ARGS)

.PHONY: gpu-test
gpu-test: setup testbed ## the test suite of real engines on an NVIDIA GPU; says so where there is none
	@nvidia-smi -L >/dev/null 2>&1 || [ -e /dev/nvidia0 ] || \
		{ echo "gpu-test: no NVIDIA GPU on this machine (nvidia-smi lists none): nothing was run" >&2; exit 75; }
	@$(PY) -m pytest -m gpu --durations=10 tests/gpu $(ARGS)

##@ simulation and figures

.PHONY: sim
sim: setup ## one seeded world in virtual time: invariants and a digest (ARGS='--seed 7')
	@$(BIN)/msd sim --seed 1 --requests 2000 $(ARGS)

.PHONY: bench
bench: setup testbed ## measure every figure with a bar; tables here, JSON in build/bench
	@$(PY) -m tests.bench $(ARGS)

.PHONY: bench-modeswitch
bench-modeswitch: setup testbed ## measure every figure of the mode switch (docs/reference/modeswitch.md)
	@$(PY) -m tests.bench --suite modeswitch $(ARGS)

.PHONY: bench-energy
bench-energy: setup ## measure the energy ledger alone
	@$(PY) -m tests.bench energy $(ARGS)

.PHONY: docs
docs: setup ## write the config reference and the pages of figures anew
	@$(PY) -m msd.config --write-docs docs/reference/config.md
	@$(PY) -m tests.bench --write-docs docs/reference/performance.md
	@$(PY) -m tests.bench --suite modeswitch --write-docs docs/reference/modeswitch.md

##@ rarely

.PHONY: testbed-train
testbed-train: setup ## train the tiny models anew from seed 0 (hours on 2 cores; the weights are in the repository)
	@$(PY) -m testbed.train --all --seed 0

.PHONY: install-systemd
install-systemd: ## copy unit, sysusers and example config below DESTDIR; starts nothing
	@if [ -z "$(DESTDIR)" ] || [ "$$(realpath -m -- "$(DESTDIR)")" = / ]; then \
		if [ "$(CONFIRM)" != 1 ]; then \
			echo "install-systemd: would copy into the running system; say DESTDIR=/some/root, or CONFIRM=1" >&2; exit 2; \
		fi; \
	fi
	install -D -m 0644 systemd/msd.service "$(DESTDIR)/usr/lib/systemd/system/msd.service"
	install -D -m 0644 systemd/msd.sysusers "$(DESTDIR)/usr/lib/sysusers.d/msd.conf"
	install -D -m 0644 systemd/msd-clocks@.service "$(DESTDIR)/usr/lib/systemd/system/msd-clocks@.service"
	install -D -m 0755 systemd/msd-clocks "$(DESTDIR)/usr/libexec/msd-clocks"
	install -D -m 0644 config.toml "$(DESTDIR)/usr/share/doc/msd/config.toml"

.PHONY: clean
clean: ## remove build output and caches; .venv stays
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	find msd loadgen testbed tests scripts -type d -name __pycache__ -prune -exec rm -rf {} +
