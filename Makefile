# `make check` is what CI runs, in the environment at hand.
.PHONY: check format
check:
	pytest
	ruff check .
	ruff format --check .
	mypy
	lint-imports
format:
	ruff format .
	ruff check --fix .
