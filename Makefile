# Every target sets itself up in .venv, at the versions in constraints.txt. ARGS reaches the program: make demo ARGS=--quick
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

# `python -m` in a checkout that is not installed: submodules of fused_gp, such as its kernels, are looked for here too.
FROM_CHECKOUT := $(PYTHON) -c 'import runpy, sys, fused_gp; fused_gp.__path__.append("$(CURDIR)"); \
	runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)'

.PHONY: demo figures test test-gpu bench bench-gpu bench-host bench-systems bench-methods lint clean

demo: .venv/demo
	$(BIN)/python examples/digits.py $(ARGS)

# The pictures and numbers of docs/figures.md, into out/.
FIGURES := value_surfaces gradients_by_layer unit_gradient_norm digits_ablation methods_compared tabular

figures: .venv/demo
	set -e; for figure in $(FIGURES); do $(BIN)/python examples/$$figure.py $(ARGS); done

test: .venv/dev
	$(BIN)/python -m pytest -n auto --dist loadgroup --benchmark-disable $(ARGS)

# The kernels compiled and run on the device at hand instead of interpreted. Needs torch, Triton, NumPy and pytest; no
# network, and nothing is installed.
test-gpu:
	@$(PYTHON) -c 'import numpy, pytest, torch, triton' || { echo "make test-gpu needs them beside $(PYTHON)" >&2; exit 1; }
	$(FROM_CHECKOUT) pytest -m gpu $(ARGS)

SUITES := ops penalties training

# Against the peers, on this machine; ARGS=--quick takes a few cases. A whole run writes benchmarks/results and the pages,
# and so do those of the other bench targets.
bench: .venv/peers
	$(BIN)/python -m benchmarks $(SUITES) $(ARGS)

# The same on the device at hand. Needs torch and numpy, no network; where matplotlib is missing, the pictures wait for
# `python -m benchmarks report`.
bench-gpu:
	@$(PYTHON) -c 'import numpy, torch' || { echo "make bench-gpu needs them beside $(PYTHON)" >&2; exit 1; }
	$(FROM_CHECKOUT) benchmarks $(SUITES) --device cuda $(ARGS)

# What launches cost the host on a simulated GPU; the penalties of systems that people use; the methods.
bench-host bench-systems bench-methods: bench-%: .venv/dev
	$(BIN)/python -m benchmarks $* $(ARGS)

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

# Peers that are packages.
.venv/peers: .venv/dev
	$(BIN)/python -m pip install -c constraints.txt -e '.[peers]'
	touch $@
