# make demo    the main job on this machine: train, linearize, serve, report (FRESH=1 starts over,
#              MODEL=… linearizes that model instead of one trained here: a Hugging Face folder, a
#              GGUF file, or a name on the Hub)
# make serve   serves what make demo has trained, with a playground, until Ctrl-C (PORT=8000)
# make test    the tests;  make test-all    those that take long, too
# make bench-quick   the few ratios that tell how fast this machine is, in four minutes
# make check   formatting, lint, types, import floors
# make clean   removes what make has built; what jobs have made, in runs/, stays
# Every target first builds .venv from pyproject.toml, once.

PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo serve test test-all bench-quick check setup clean

demo: $(STAMP)
	@$(PY) -m jobs.demo demo $(if $(filter-out 0,$(FRESH)),fresh=true) $(if $(MODEL),model=$(MODEL))

serve: $(STAMP)
	@$(PY) -m jobs.serve demo $(if $(PORT),port=$(PORT))

test: $(STAMP)
	@$(PY) -m pytest

test-all: $(STAMP)
	@$(PY) -m pytest -m "not gpu or gpu"

bench-quick: $(STAMP)
	@$(PY) -m jobs.bench_quick

check: $(STAMP)
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@$(PY) -m pytest tests/test_floors.py

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "linearized needs Python 3.11 or newer; $$($(PYTHON) --version) found. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up .venv (once; a few minutes)"
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --editable '.[dev]' 2>.venv/install.log || \
		{ cat .venv/install.log; exit 1; }
	@touch $@

clean:
	rm -rf build linearized.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	if [ -f $(STAMP) ]; then rm -rf .venv; fi
