# make demo   run the main job: real files and attacks, each in a compartment
# make test   build, lint and run the tests
# Both make a virtual environment in .venv first; all they need is python3 with venv and headers, a C compiler and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
GROUPS := --group build --group test --group lint --group bench
PYTEST_ARGS ?=

.PHONY: demo test build lint bench fuzz soak test-all clean

demo: build
	$(BIN)/python examples/demo.py

test: build lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

build: $(VENV)/.ready
	$(BIN)/python setup.py -q build_ext --inplace

lint: build
	$(BIN)/ruff check compart tests examples benchmarks setup.py
	$(BIN)/ruff format --check compart tests examples benchmarks setup.py
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: build
	$(BIN)/python -m benchmarks.ratios

# Long forms of what CI runs for a moment.
fuzz: build
	COMPART_FUZZ_SECONDS=$${COMPART_FUZZ_SECONDS:-600} $(BIN)/python -m pytest tests/fuzz

soak: build
	COMPART_SOAK=$${COMPART_SOAK:-100000} $(BIN)/python -m pytest tests/soak

# The tests under every supported interpreter that this machine has.
test-all:
	@for version in 3.11 3.12 3.13; do \
		python=$$(.ci/find-python $$version) || { echo "python$$version: not installed, not tested"; continue; }; \
		$(MAKE) build VENV=.venv-$$version PYTHON=$$python && \
		.venv-$$version/bin/python -m pytest $(PYTEST_ARGS) || exit 1; \
	done

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install -q --disable-pip-version-check $(GROUPS)
	touch $@

clean:
	rm -rf build .venv .venv-3.* compart/*.so compart/backend/linux/*.so
