# Every target sets itself up in .venv, at the versions in constraints.txt. ARGS reaches the program: make demo ARGS=--quick
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: demo figures test test-gpu bench bench-ops bench-systems bench-methods lint clean

demo: .venv/demo
	$(BIN)/python examples/digits.py $(ARGS)

# The pictures and numbers of docs/figures.md, into out/.
FIGURES := value_surfaces gradients_by_layer unit_gradient_norm digits_ablation methods_compared tabular

figures: .venv/demo
	set -e; for figure in $(FIGURES); do $(BIN)/python examples/$$figure.py $(ARGS); done

test: .venv/dev
	$(BIN)/python -m pytest -n auto --dist loadgroup $(ARGS)

# The kernels compiled and run on the device at hand instead of interpreted. Needs the packages, no network.
test-gpu:
	$(PYTHON) -m pytest -m gpu $(ARGS)

# The three have options of their own: give ARGS to one of them.
bench: bench-ops bench-systems bench-methods

bench-ops: .venv/dev
	$(BIN)/python -m benchmarks.ops $(ARGS)

bench-systems: .venv/dev
	$(BIN)/python -m benchmarks.systems $(ARGS)

bench-methods: .venv/dev
	$(BIN)/python -m benchmarks.methods $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv out build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml setup.py constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e '.[examples]'
	touch $@

.venv/dev: .venv/bin/python pyproject.toml setup.py constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@ .venv/demo
