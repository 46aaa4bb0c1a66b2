# `make demo` and `make test` need only python3 (3.10 or newer, with its venv module) and make.

PYTHON ?= python3
INSTALLED := .venv/.ptq4vit-installed

# NNCF builds its CPU kernels on first use and looks for ninja, which pip puts here, on the PATH.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test

demo: $(INSTALLED)
	.venv/bin/python examples/digits/demo.py

# Two processes of one thread each: most tests are too small for the threads of one operation.
test: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2

# Installs again when the dependencies or entry points change; an existing .venv is reused.
$(INSTALLED): setup.cfg pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[openvino,onnx,report,test,dev]'
	touch $@
