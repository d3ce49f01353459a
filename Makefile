# The commands a person types. Everything they need beyond Rust, Python and a C++ compiler is
# installed into .venv; the first run takes three minutes, later ones seconds.

PYTHON ?= python3
VENV   := $(CURDIR)/.venv
BIN    := $(VENV)/bin
TORCH   = $(shell $(BIN)/python -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("torch").origin))')
# libtorch, and the NVRTC that compiles every CUDA kernel, also where there is no GPU.
LIBRARIES = $(TORCH)/lib:$(TORCH)/../nvidia/cu13/lib
SOURCES := $(shell find crates Cargo.toml Cargo.lock -name '*.rs' -o -name '*.toml' -o -name '*.cu*' -o -name '*.lock')

# torch-sys, of the tests, asks this environment's Python where libtorch is.
export VIRTUAL_ENV := $(VENV)
export PATH := $(BIN):$(PATH)
# The embedded model and the tests' own models need no hub.
export HF_HUB_OFFLINE ?= 1
# pip speaks of what goes wrong only.
export PIP_QUIET ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

PROMPT ?= It is a truth universally acknowledged, that
# A text as it is: neither make nor the shell shall see words of theirs in it.
override PROMPT := $(value PROMPT)
export PROMPT

.PHONY: run test test-rust test-python lint format bench bench-kernels dist clean

run: $(VENV)/.built
	@$(BIN)/nano-batch generate --prompt="$$PROMPT"

test: test-rust test-python

# nano_core and nano_text need no libtorch: they run with debug assertions, in seconds.
test-rust: $(VENV)/.dev
	cargo test --locked -p nano_core -p nano_text
	LD_LIBRARY_PATH=$(LIBRARIES) cargo test --locked --release -p nano_kernels -p nano_model -p nano_engine

test-python: $(VENV)/.built $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	cargo fmt --all --check
	cargo clippy --locked --release --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --quiet --no-deps --workspace
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy python/nano_batch

format: $(VENV)/.dev
	cargo fmt --all
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# nano_batch beside transformers on this machine: JSON and pictures in benches/results/local/. Two
# cores need less than 10 minutes.
bench: $(VENV)/.built $(VENV)/.dev
	$(BIN)/nano-batch bench throughput
	$(BIN)/nano-batch bench latency
	$(BIN)/nano-batch bench plot

# Criterion's microbenchmarks, and each CUDA kernel where there is a GPU. To compare with an earlier
# state: BENCH="--save-baseline NAME", later BENCH="--baseline NAME".
BENCHES := block_allocator scheduler detokenizer sampler cpu_kernels cuda_kernels
bench-kernels: $(VENV)/.dev
	LD_LIBRARY_PATH=$(LIBRARIES) cargo bench --locked $(BENCHES:%=--bench %) -- $(BENCH)

dist: $(VENV)/.deps
	$(BIN)/maturin build --locked --release --out dist

clean:
	rm -rf $(VENV) target dist

$(VENV)/.deps: pyproject.toml
	@command -v cargo >/dev/null || { echo "cargo is missing: install Rust (rustup.rs)"; exit 1; }
	@command -v c++ >/dev/null || { echo "c++ is missing: install a C++ compiler (g++ or clang)"; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.11 or later"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11: set PYTHON=python3.11 or later"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) has no venv module: install it (Debian: python3-venv)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install numpy tqdm "maturin>=1.10,<2"
	@touch $@

# An editable install: changes of Python files need no build.
$(VENV)/.built: $(VENV)/.deps $(SOURCES)
	@echo "Building nano_batch (about two minutes the first time)"
	@$(BIN)/maturin develop --locked --release --quiet
	@touch $@

$(VENV)/.dev: $(VENV)/.deps
	@echo "Installing what tests and benchmarks need into .venv (torch is large: a minute or more)"
	@$(BIN)/python -m pip install $$($(BIN)/python -c \
		'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"])')
	@touch $@
