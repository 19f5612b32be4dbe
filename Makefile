# make demo    the main job on real handwritten digits; writes demo/report.html
# make test    every test
# make lint    style and types
#
# Both need Python 3.11 or newer and an internet connection, and make their own environment in .venv.

PYTHON ?= python3
VENV ?= .venv
# The version that the figures in README.md were taken with. Any other: make demo TORCH="torch torchvision"
TORCH ?= torch==2.14.1 torchvision==0.29.1
OUT ?= demo
ARGS ?=
# Tests run in so many processes, with a thread each.
JOBS ?= 2

.PHONY: demo test lint clean

demo: $(VENV)/.installed-demo
	$(VENV)/bin/python -m forged_fx.demo --out $(OUT) $(ARGS)

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "forged_fx needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Installed once, and again when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --disable-pip-version-check $(TORCH)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --editable ".[$*]"
	@touch $@
