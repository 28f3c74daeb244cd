# One command each; every one of them starts from a fresh clone with nothing but Python 3.11 or later.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported: most of 250 packages' never are.
PIP := $(BIN)/python -m pip install --no-compile --disable-pip-version-check -c constraints.txt
CORE := $(VENV)/.installed-core
DEV := $(VENV)/.installed-dev

# On Linux without an NVIDIA driver, PyTorch comes from PyTorch's own index, whose CPU builds are a tenth as large as PyPI's
# with CUDA. Where that index cannot be reached, pip falls back to PyPI; `make TORCH_INDEX= ...` uses PyPI alone.
TORCH_INDEX ?= $(shell test "$$(uname -s)" != Linux || command -v nvidia-smi >/dev/null || echo https://download.pytorch.org/whl/cpu)

.PHONY: venv demo browser docs test test-slow test-service test-gpu lint release-check clean

venv: $(DEV)

# What an edit needs and nothing else. Installed again only when pyproject.toml or constraints.txt change.
$(CORE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("expected Python 3.11 or later; name one: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP) --retries 1 --no-deps --extra-index-url $(TORCH_INDEX) torch)
	$(PIP) -e .
	touch $@

$(DEV): $(CORE)
	$(PIP) -e '.[dev]'
	touch $@

demo: $(CORE)
	mkdir -p demo-output
	$(BIN)/openwu edit photos/life_by_aitzol_berasategi.jpg --instruction "make it look like an old photograph" \
		--output demo-output/demo.png --compare --overwrite

# The page that edits in the browser, in build/browser/site; any static host serves it (docs/browser.md).
ORT_WEB := 1.30.0
browser: venv
	npm install --prefix build/browser --no-audit --no-fund --ignore-scripts onnxruntime-web@$(ORT_WEB)
	$(BIN)/openwu browser --output build/browser/site --runtime build/browser/node_modules/onnxruntime-web/dist

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: venv lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-slow: venv
	$(BIN)/pytest -m "slow and not gpu"

# The service with real processes and clients (docs/serving.md); OPENWU_SOAK_SECONDS=7200 overloads it for two hours.
test-service: venv
	$(BIN)/pytest -v -s tests/serving

# Everything that needs a GPU, in ten to fifteen minutes; runs/device has the results (docs/performance.md).
test-gpu: venv
	benchmarks/device.sh

# The pages of docs/ and the API reference as a site in site/; a broken link fails. `.venv/bin/mkdocs serve` shows it while one writes.
docs: venv
	$(BIN)/mkdocs build --strict

# Source archive and wheel in dist/, checked as PyPI checks them (docs/releasing.md).
release-check: venv
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) demo-output dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
