# Everything runs in .venv, which the README's commands make.
PYTHON := .venv/bin/python

.PHONY: check test kernels docs format

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

test:
	$(PYTHON) -m pytest -n 2 --dist worksteal

# Compiles the kernels of many rows for every card, without one.
kernels:
	EVERY_CARD=1 $(PYTHON) -m pytest -n 2 tests/engine/kernels/test_compiled.py

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
