# The development loop. Every target installs what it needs into .venv first.
BIN := .venv/bin

.PHONY: check test lint types format demo setup

check: lint types test

setup:
	launchers/setup.sh --dev

test:
	launchers/test.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy --strict

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo:
	launchers/demo.sh
