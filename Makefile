# Every target does its own set-up: on a fresh Debian 12 machine with Python 3.11 and cargo, as root, `make demo` or `make test` is all
# that has to be typed. Stamp files under .cache/make make a second call quick.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

VENV   := .venv
BIN    := $(VENV)/bin
STAMPS := .cache/make
# Debian's own interpreter: the wheel is abi3, and a container on the host's files finds it at a plain path.
PYTHON ?= /usr/bin/python3.11
# Extra arguments for pytest: make test ARGS="-k redis -x"
ARGS ?=
ROUNDS ?= 200
CYCLES ?= 300

LAUNCHER := python/torpor/_bin/torpor-launcher
RUST_SOURCES   := Cargo.toml $(wildcard Cargo.lock) $(shell find rust -name '*.rs' -o -name Cargo.toml -o -name build.rs 2>/dev/null)
LAUNCHER_SRC   := Cargo.toml $(wildcard Cargo.lock) $(shell find rust/launcher rust/sys -name '*.rs' -o -name Cargo.toml -o -name build.rs 2>/dev/null)
PYTHON_SOURCES := pyproject.toml README.md $(shell find python -name '*.py' -o -name '*.pyi' -o -name py.typed 2>/dev/null)

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# ---- set-up -------------------------------------------------------------------------------------------------------------------------

$(STAMPS)/packages: tests/support/packages.txt tests/support/install-packages.sh
	bash tests/support/install-packages.sh
	@mkdir -p $(@D) && touch $@

$(STAMPS)/venv: $(STAMPS)/packages pyproject.toml
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group dev
	@mkdir -p $(@D) && touch $@

# The launcher is linked statically, libseccomp too, and small: it runs from a sealed memfd, on machines that have neither.
$(LAUNCHER): $(STAMPS)/packages $(LAUNCHER_SRC)
	sh rust/launcher/build.sh

$(STAMPS)/wheel: $(STAMPS)/venv $(LAUNCHER) $(RUST_SOURCES) $(PYTHON_SOURCES)
	rm -rf dist
	$(BIN)/maturin build --release --interpreter $(BIN)/python --out dist
	unzip -lq dist/torpor-*.whl > $(STAMPS)/wheel.list
	grep -q torpor/_bin/torpor-launcher $(STAMPS)/wheel.list || { echo 'the wheel lacks the launcher' >&2; exit 1; }
	@mkdir -p $(@D) && touch $@

$(STAMPS)/installed: $(STAMPS)/wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall dist/torpor-*.whl
	@touch $@

# ---- what people type ---------------------------------------------------------------------------------------------------------------

.PHONY: build
build: $(STAMPS)/installed ## Build everything and install it into .venv

.PHONY: wheel
wheel: $(STAMPS)/wheel ## Build the wheel into dist/

.PHONY: demo
demo: $(STAMPS)/installed ## Show a container go to sleep in a file and wake up
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

# lint and the Rust tests come first, pytest's closing line is the last one printed
.PHONY: test
test: $(STAMPS)/installed ## Lint, test Rust, test Python and real containers
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory test-rust
	$(MAKE) --no-print-directory test-python

.PHONY: test-rust
test-rust: $(STAMPS)/packages ## Only the Rust tests
	cargo test --quiet --no-fail-fast -p torpor-sys -p torpor-image -p torpor-engine -p torpor-launcher

.PHONY: test-python
test-python: $(STAMPS)/installed ## Only pytest: make test-python ARGS="-k pipe"
	$(BIN)/python -m pytest $(ARGS)

.PHONY: lint
lint: $(STAMPS)/installed ## rustfmt, clippy, ruff, mypy, stubtest, layering
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/support/run_stubtest.py
	$(BIN)/python tests/support/check_layers.py

.PHONY: fmt
fmt: $(STAMPS)/venv ## Format Rust and Python
	cargo fmt --all
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

.PHONY: bench
bench: $(STAMPS)/installed ## The targets table, next to raw I/O; writes docs/benchmarks.md
	$(BIN)/python benches/bench.py $(ARGS)

.PHONY: soak
soak: $(STAMPS)/installed ## Kill torpor at random moments, ROUNDS=200 times each; then CYCLES=300 of checkpoint and restore
	TORPOR_SOAK_ROUNDS=$(ROUNDS) $(BIN)/python -m pytest -m 'soak or not soak' tests/integration/test_never_harm.py -s $(ARGS)
	TORPOR_SOAK_ROUNDS=$(CYCLES) $(BIN)/python -m pytest -m soak tests/integration/test_soak.py -s $(ARGS)

.PHONY: clean
clean: ## Remove what was built (not .venv)
	rm -rf target target-launcher dist $(STAMPS)/wheel $(STAMPS)/installed python/torpor/_bin
