# Everything runs in .venv, which the README's commands make.
PYTHON := .venv/bin/python

.PHONY: check calls test kernels docs format

check:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy qwencli
	.venv/bin/mypy --platform win32 --no-warn-unreachable --cache-dir .mypy_cache/win32 qwencli
	.venv/bin/lint-imports
	$(PYTHON) tools/docs/cli_reference.py --check
	$(PYTHON) tools/docs/experiments_index.py --check
	$(PYTHON) tools/docs/experiment_tables.py --check
	$(PYTHON) tools/docs/readme_tables.py --check
	$(PYTHON) tools/docs/predictions.py --check
	$(PYTHON) tools/docs/findings.py --check
	$(PYTHON) tools/docs/results_index.py --check

# What a GPU or another engine alone runs, and no test of a CPU, calls functions as they are now.
calls:
	! .venv/bin/mypy tests benchmarks tools \
		| grep -E 'Missing (positional|named) argument|Unexpected keyword|\[syntax\]|Duplicate module|found twice'

test:
	$(PYTHON) -m pytest -n 2 --dist worksteal

# Compiles all kernels for every card, without one, and writes what each needs.
kernels:
	EVERY_CARD=1 $(PYTHON) -m pytest -n 2 tests/engine/kernels/test_compiled.py
	$(PYTHON) tools/kernels_by_card.py results/2026-11-30-kernels-by-card --cards 80,86,89,90,120

docs:
	$(PYTHON) tools/docs/cli_reference.py
	$(PYTHON) tools/docs/experiments_index.py
	$(PYTHON) tools/docs/experiment_tables.py
	$(PYTHON) tools/docs/readme_tables.py
	$(PYTHON) tools/docs/predictions.py
	$(PYTHON) tools/docs/findings.py
	$(PYTHON) tools/docs/results_index.py

format:
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
