# make serve   install into .venv and serve the demo model on this machine
# make test    install into .venv and run the tests that need no GPU, but for those named below
# make chaos   more real clusters and faults: gateways, all workers in turn, leader and etcd at once, ranks of one replica
# make matrix  every model family on every mesh, and the demo model's own weights, against transformers
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Changes only when what is to be installed changes, so that a second run starts at once.
STAMP := $(VENV)/.installed
# Further options of `perdure up` and of pytest: make serve ARGS="--port 9000"
ARGS ?=
# Test files run at a time. Many of them wait for leases to expire, so one more than the cores of a small machine.
JOBS ?= 3

.PHONY: serve test chaos matrix lint check protos clean

serve: $(STAMP)
	@$(BIN)/perdure up $(ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest -m 'not gpu' -n $(JOBS) --dist loadscope --no-loadscope-reorder $(ARGS)

chaos: $(STAMP)
	@$(BIN)/python -m pytest -m chaos -s $(ARGS)

matrix: $(STAMP)
	@$(BIN)/python -m pytest -m matrix $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# Everything that is checked without running: style, types, import rules, protocol, generated files.
check: lint
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/python -m tools.gen_protos --check

protos: $(STAMP)
	$(BIN)/python -m tools.gen_protos

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find controlplane dataplane protos tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "perdure needs Python 3.11 or newer; this is " + sys.version.split()[0] + " (set PYTHON=...)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet --use-pep517 -c constraints.txt -e '.[worker,demo,dev]'
	@touch $@
