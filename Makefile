# `make demo` and `make test` are all that a fresh machine needs. PYTHON= chooses the interpreter;
# ARGS= goes to the command: make test ARGS=tests/test_layering.py
ARGS =
BIN = .venv/bin
# Two processes, because most tests keep only one core busy; each file stays in one of them.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: help venv demo test test-all lint wheel clean

help:
	@echo "make demo      install, then train, evaluate and predict on a generated CT phantom"
	@echo "make test      install, then the fast tests"
	@echo "make test-all  the slow and wide tests too"
	@echo "make lint      ruff (check, format) and mypy"
	@echo "make wheel     build the wheel into dist/"
	@echo "make clean     remove .venv, dist/ and caches"
	@echo "PYTHON=path chooses the Python (3.11 to 3.13), ARGS=... goes to demo, test and test-all"

venv:
	@PYTHON="$(PYTHON)" .ci/venv

demo: venv
	$(BIN)/maknet demo $(ARGS)

test: venv
	$(PYTEST) $(ARGS)

test-all: venv
	$(PYTEST) -m "" $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: venv
	$(BIN)/python -m build --wheel --no-isolation

clean: # removes the demo too
	rm -rf .venv dist build demo .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
