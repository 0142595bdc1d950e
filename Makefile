# Every target sets itself up in .venv, at the versions in constraints.txt. ARGS reaches the program: make demo ARGS=--quick
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: demo figures test test-gpu gpu bench bench-host bench-systems bench-methods lint clean

demo: .venv/demo
	$(BIN)/python examples/digits.py $(ARGS)

# The pictures and numbers of docs/figures.md, into out/.
FIGURES := value_surfaces gradients_by_layer unit_gradient_norm digits_ablation methods_compared tabular

figures: .venv/demo
	set -e; for figure in $(FIGURES); do $(BIN)/python examples/$$figure.py $(ARGS); done

test: .venv/dev
	$(BIN)/python -m pytest -n auto --dist loadgroup --benchmark-disable $(ARGS)

# The kernels compiled and run on the device at hand instead of interpreted. Needs torch, Triton, NumPy and pytest beside
# PYTHON; no network, and nothing is installed.
test-gpu:
	@$(PYTHON) -c 'import numpy, pytest, torch, triton' || { echo "make test-gpu needs them beside $(PYTHON)" >&2; exit 1; }
	$(PYTHON) -m pytest -p benchmarks.checkout -m gpu $(ARGS)

# Everything that one wants to know of a device, in BUDGET seconds: those tests, the ops, whole penalties, experiments.
# Also needs pytest-xdist. `python -m benchmarks report OUT` makes pages of it. DEVICE=cpu rehearses the command.
DEVICE ?= cuda
BUDGET ?= 420
OUT ?= out/gpu
ON_DEVICE := $(if $(filter cpu,$(DEVICE)),$(BIN)/python,$(PYTHON))

gpu: $(if $(filter cpu,$(DEVICE)),.venv/dev)
	@$(ON_DEVICE) -c 'import numpy, pytest, torch, triton, xdist' \
		|| { echo "make gpu needs them beside $(ON_DEVICE)" >&2; exit 1; }
	$(ON_DEVICE) -m benchmarks gpu --device $(DEVICE) --budget $(BUDGET) --out '$(OUT)'

# Against the peers, on this machine; ARGS=--quick takes a few cases. A whole run writes benchmarks/results and the pages,
# and so do those of the other bench targets.
bench: .venv/peers
	$(BIN)/python -m benchmarks ops penalties training $(ARGS)

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
