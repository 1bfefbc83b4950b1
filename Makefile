# Every target sets itself up in .venv from the pinned versions in requirements.lock; all it needs is Python 3.11 or
# newer and make. PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test studies bench docs lint lock clean

demo: .venv/.installed-demo
	$(BIN)/steersman demo

test: .venv/.installed-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n 2 --dist worksteal

studies: .venv/.installed-all
	$(BIN)/python -m steersman.studies

bench: .venv/.installed-all benchmarks/.venv-peers/.installed
	$(BIN)/python benchmarks/ppo.py

docs: .venv/.installed-all
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: .venv/.installed-all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/pyright

# The versions that are tested together, for whoever changes the dependencies.
lock: .venv/.installed-all
	$(BIN)/python -m pip freeze --exclude-editable | grep -v '^torch==' > requirements.lock

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed-demo: pyproject.toml requirements.lock | .venv/bin/python
	$(PIP) --constraint requirements.lock --editable .
	touch $@

# PyTorch comes first and alone: asked for by another package, it would bring several gigabytes that no test needs.
.venv/.installed-all: pyproject.toml requirements.lock | .venv/bin/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) torch==2.13.0
	$(PIP) --constraint requirements.lock --editable ".[mujoco,robotics,dev,docs]"
	touch $@ .venv/.installed-demo

# Peers get an environment of their own: rejax needs an older gymnax.
benchmarks/.venv-peers/.installed: benchmarks/requirements-peers.txt
	$(PYTHON) -m venv benchmarks/.venv-peers
	benchmarks/.venv-peers/bin/python -m pip install --quiet torch==2.13.0
	benchmarks/.venv-peers/bin/python -m pip install --quiet --requirement benchmarks/requirements-peers.txt
	touch $@

clean:
	rm -rf .venv benchmarks/.venv-peers site build dist
