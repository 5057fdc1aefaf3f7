# The commands of the project; `make help` lists them. Everything is built inside the tree (.venv, .venv-demo, .cache, target, dist), all
# of it ignored by git. Installs leave stamps: what has not changed is not done again. PYTHON=python3.12 picks an interpreter.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
DEMO_VENV := .venv-demo
# --locked in CI: a Cargo.lock that is out of date is an error there, and brought up to date at a desk.
LOCKED := $(if $(CI),--locked)
NEED := sh .ci/need "$(PYTHON)"

RUST_SOURCES := Cargo.toml $(wildcard Cargo.lock) rust-toolchain.toml $(shell find rust -type f \( -name '*.rs' -o -name 'Cargo.toml' \))
WHEEL_SOURCES := pyproject.toml README.md LICENSE $(RUST_SOURCES) \
    $(shell find python \( -name '*.py' -o -name '*.pyi' -o -name py.typed \) -type f) $(wildcard models/tiny-assistant/*)

# The wheel is built by the work environment where there is one, so that `make setup` and `make demo` compile once between them.
BUILD_VENV := $(if $(wildcard $(VENV)/.stamp-dev),$(VENV),.cache/venv-build)

# Rust's tests and lints see the same interpreter as maturin.
CARGO_ENV := PYO3_PYTHON="$(CURDIR)/$(PY)"

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long lint rust-lint python-lint rust-test python-test fmt bench bench-cuda wheel lock deny clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.stamp-runtime $(VENV)/.stamp-exporter ## build everything for work into .venv: runtime, exporter, test tools

demo: $(DEMO_VENV)/.stamp ## install what the demo needs (no PyTorch) into .venv-demo and run it; DEMO_ARGS="--seed 7" is passed on
	@$(DEMO_VENV)/bin/deltamem demo $(DEMO_ARGS)

test: lint rust-test python-test ## formatting, lints, types, stubs, Rust's tests, Python's tests; Redis' own need redis-server (apt-get install redis-server)

test-long: setup ## the same tests and the long ones: soaks, long fuzzing, training
	$(call rust_tests,--run-ignored all,--include-ignored)
	$(PY) -m pytest -m "long or not long"

lint: rust-lint python-lint ## formatting, clippy, ruff, mypy, stubtest

rust-lint: setup
	cargo fmt --all --check
	$(CARGO_ENV) cargo clippy --workspace --all-targets $(LOCKED) -- -D warnings

python-lint: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m mypy.stubtest deltamem_rt._native

# $(1): what nextest needs to be told, $(2): the same for cargo test, which stands in where nextest is not installed.
define rust_tests
	@if cargo nextest --version >/dev/null 2>&1; then \
	    set -x; $(CARGO_ENV) cargo nextest run --workspace --no-tests=pass $(LOCKED) $(1); \
	else \
	    set -x; $(CARGO_ENV) cargo test --workspace $(LOCKED) -- $(2); \
	fi
endef

rust-test: setup
	$(call rust_tests,,)

python-test: setup dist/.stamp
	$(PY) -m pytest

fmt: setup ## format all Rust and Python
	cargo fmt --all
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: setup dist/.stamp ## run the benches; the results go into docs/benchmarks.md; BENCH_ARGS="cost scan" runs these alone
	$(PY) benches/run.py $(BENCH_ARGS)

bench-cuda: setup dist/.stamp ## the same on an NVIDIA card, into docs/benchmarks-cuda.md; without one it says so and writes nothing
	$(PY) benches/run.py cuda

wheel: dist/.stamp ## build the wheel into dist/
	@ls -l dist/*.whl

lock: setup ## write requirements/*.txt again from what .venv holds
	$(PY) requirements/lock.py

deny: ## licences, bans and sources of the crates (needs cargo-deny)
	@cargo deny --version >/dev/null 2>&1 || { echo "make: cargo-deny is missing: cargo install cargo-deny" >&2; exit 1; }
	cargo deny check licenses bans sources

clean: ## remove what building made, keep the environments
	rm -rf target dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.stamp-runtime $(DEMO_VENV)/.stamp python/deltamem_rt/_native*.so python/deltamem_rt/_native*.pyd

distclean: clean ## remove the environments too
	rm -rf $(VENV) $(DEMO_VENV) .cache

# ---------------------------------------------------------------- environments, each with its stamps inside

INSTALL := -m pip install --disable-pip-version-check --quiet

$(VENV)/.stamp-dev: requirements/dev.txt
	@$(NEED) python rust cc
	@test -x $(PY) || "$(PYTHON)" -m venv $(VENV)
	$(PY) $(INSTALL) -r requirements/dev.txt
	@touch $@

$(VENV)/.stamp-runtime: $(VENV)/.stamp-dev pyproject.toml $(RUST_SOURCES)
	@$(NEED) rust cc
	VIRTUAL_ENV="$(CURDIR)/$(VENV)" $(PY) -m maturin develop --release $(LOCKED)
	@touch $@

$(VENV)/.stamp-exporter: $(VENV)/.stamp-dev export/pyproject.toml
	$(PY) $(INSTALL) --no-deps --no-build-isolation --editable ./export
	@touch $@

.cache/venv-build/.stamp-dev: requirements/build.txt
	@$(NEED) python rust cc
	"$(PYTHON)" -m venv .cache/venv-build
	.cache/venv-build/bin/python $(INSTALL) -r requirements/build.txt
	@touch $@

dist/.stamp: $(WHEEL_SOURCES) | $(BUILD_VENV)/.stamp-dev
	@$(NEED) rust cc
	rm -rf dist
	$(BUILD_VENV)/bin/python -m maturin build --release --out dist --interpreter $(BUILD_VENV)/bin/python --compression-level 9 $(LOCKED)
	@touch $@

$(DEMO_VENV)/.stamp: dist/.stamp requirements/demo.txt
	@test -x $(DEMO_VENV)/bin/python || "$(PYTHON)" -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python $(INSTALL) -r requirements/demo.txt
	$(DEMO_VENV)/bin/python $(INSTALL) --no-deps --force-reinstall dist/*.whl
	@touch $@
