# `make demo` and `make test` are each the only command needed on a fresh machine with python3 >= 3.11 and make.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

.PHONY: setup demo test check tables bench clean
.DEFAULT_GOAL := setup

setup: .venv/.complete

# To compile every module of every package takes longer than to unpack them: only what is imported is compiled, and kept
# (containers often say PYTHONDONTWRITEBYTECODE, which would compile it at each start).
unexport PYTHONDONTWRITEBYTECODE

.venv/.complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "privzoo needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true): name another one, as in 'make $(MAKECMDGOALS) PYTHON=python3.12'." >&2; \
	  exit 1; }
	@echo "Setting up .venv (some minutes and 2.5 GB the first time) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@$(BIN)/python -c 'import privzoo.run, privzoo.models.adapters'
	@touch $@

# Finished runs are not done again: their id decides.
demo: setup
	$(BIN)/python -m privzoo.train -m method=dp_full,dp_bitfit,dp_bitfit_two_phase,dp_lora,dp_qlora,dp_head,dpzero \
	  eps=3,8,inf output_dir=runs/demo
	$(BIN)/python -m privzoo.reporting.display runs/demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	  -m "not sweep" --ignore=tests/test_mutants.py --ignore=tests/test_remade_models.py

# Further cases of what `make test` tries once. The mutants test the tests: each breaks src in one place, and a named test must
# turn red (and is green without it, which PRIVZOO_ALL_GREEN=1 takes for known). The tiny models are made again.
check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m sweep
	OMP_NUM_THREADS=1 PRIVZOO_ALL_GREEN=$(PRIVZOO_ALL_GREEN) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup \
	  tests/test_mutants.py tests/test_remade_models.py

# From the run records in paper_tables/, a folder a table.
tables: setup
	$(BIN)/python -m privzoo.tables

# Two hours on two quiet cores; one that was cut short goes on where it was.
# `bench/engine.py only=… variants=… rounds=…` does a part.
bench: setup
	$(BIN)/python bench/engine.py
	$(BIN)/python bench/training_step.py

# Leaves the environment (.venv) and the runs (runs/) alone.
clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
