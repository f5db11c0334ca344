# Each target works on a fresh clone: it makes the virtual environment that it needs.
PYTHON ?= python3
VENV := .venv
PARITY := .venv-parity
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU)
EXTRA := $(if $(filter-out 0,$(GPU)),cuda12,)
comma := ,
SOURCES := wan22_jax convert tests benchmarks
# Two workers; a file's tests share what they compile. In the order that tests/conftest.py gives.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
GOLDEN := $(wildcard tests/golden/make_*.py)

.PHONY: install demo test long lint parity golden clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -e '.[dev$(if $(EXTRA),$(comma)$(EXTRA))]'
	touch $@

# The whole path on a tiny random model: convert, cache, train, resume, export, sample.
demo: install
	$(VENV)/bin/wan22-demo --out demo

test: install
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest -m "not gpu and not parity and not long" $(PYTEST_ARGS)

# What takes long on a CPU: kills at random moments, the benchmark of the loop, overfitting, ...
long: install
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest -m long $(PYTEST_ARGS)

lint: install
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# PyTorch first and pinned, so that no newer CUDA build comes in.
$(PARITY)/installed: pyproject.toml
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/pip install --quiet torch==2.13.0
	$(PARITY)/bin/pip install --quiet -e '.[dev,parity]'
	touch $@

# Recomputes every golden array with Diffusers or transformers and compares it with the committed
# one, then runs the tests that need PyTorch.
parity: $(PARITY)/installed
	for script in $(GOLDEN); do \
	  JAX_PLATFORMS=cpu $(PARITY)/bin/python $$script --check || exit 1; done
	JAX_PLATFORMS=cpu $(PARITY)/bin/python -m pytest -m parity $(PYTEST_ARGS)

# Writes the golden arrays anew.
golden: $(PARITY)/installed
	for script in $(GOLDEN); do JAX_PLATFORMS=cpu $(PARITY)/bin/python $$script || exit 1; done

clean:
	rm -rf $(VENV) $(PARITY) demo
