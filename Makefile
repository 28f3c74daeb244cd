# One command each; every one of them starts from a fresh clone with nothing but Python 3.11 or later.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: venv demo test test-slow test-gpu lint clean

venv: $(VENV)/.installed

# Installed again only when what is asked for changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("expected Python 3.11 or later; name one: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: venv
	mkdir -p demo-output
	$(BIN)/openwu edit photos/life_by_aitzol_berasategi.jpg --instruction "make it look like an old photograph" \
		--output demo-output/demo.png --compare --overwrite

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: venv lint
	$(BIN)/pytest -m "not slow and not gpu"

test-slow: venv
	$(BIN)/pytest -m "slow and not gpu"

test-gpu: venv
	$(BIN)/pytest -m gpu

clean:
	rm -rf $(VENV) demo-output dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
