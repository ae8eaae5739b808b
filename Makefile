# make quickstart   the main job: environment, a small EMT data set, training on 2 ranks, evaluation
# make test         the tests (a covering subset of the large matrices)
# make test-all     every test
# make lint         ruff, ruff format and mypy
#
# VENV chooses the virtual environment, PYTHON the interpreter it is made with.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RANKS ?= 2
RUN ?= runs/quickstart
DATA ?= datasets/quickstart

export DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: quickstart test test-all lint typecheck install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

quickstart: install
	$(BIN)/egnscale data make $(DATA) --structures 240 --seed 0 --workers 2
	$(BIN)/egnscale data info $(DATA)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/deepspeed --num_gpus $(RANKS) launch/train.py --config examples/configs/quickstart.yaml \
		--resume data.train=$(DATA)/s2ef/train data.val=$(DATA)/s2ef task.output=$(RUN)
	$(BIN)/egnscale evaluate $(RUN) $(DATA)
	@echo "plot: $(RUN)/training.png"

test: install
	$(BIN)/python -m pytest -q -m "not full"

test-all: install
	$(BIN)/python -m pytest -q

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

lint: $(VENV)/.dev typecheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy resolves egnscale.* through links, because the folders' names on disk are not their names as packages.
typecheck: $(VENV)/.dev
	mkdir -p .typecheck/egnscale
	for p in models scaling data launch ds_configs; do ln -sfn ../../$$p .typecheck/egnscale/$$p; done
	MYPYPATH=.typecheck $(BIN)/mypy -p egnscale.models -p egnscale.scaling -p egnscale.data -p egnscale.launch

clean:
	rm -rf .typecheck build dist *.egg-info
