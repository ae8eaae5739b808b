# make quickstart   the main job: environment, a small EMT data set, training on 2 ranks, evaluation
# make one-billion  five steps of a GemNet-T of 1.06 billion parameters on 2 ranks of this machine (20 GiB)
# make test         the tests (a covering subset of the large matrices)
# make test-all     every test
# make lint         ruff, ruff format and mypy
#
# VENV chooses the virtual environment, PYTHON the interpreter it is made with.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: quickstart one-billion test test-all lint typecheck install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# Small slabs of three metals, each relaxation followed for 12 steps: about 5,000 frames.
quickstart: export DS_ACCELERATOR = cpu
quickstart: export CUDA_VISIBLE_DEVICES =
quickstart: install
	$(BIN)/egnscale data make datasets/quickstart --structures 400 --seed 0 --workers 2 --size 3x3x4 --max-steps 12 \
		--rattle 0.1 --metals Cu,Pd,Pt --adsorbates H,C,N,O,OH,CO,NO,CH,NH,N2,H2O,NH2
	$(BIN)/egnscale data info datasets/quickstart
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/deepspeed --num_gpus 2 launch/train.py \
		--config examples/configs/quickstart.yaml --resume
	$(BIN)/egnscale evaluate runs/quickstart datasets/quickstart
	@echo "loss and errors: runs/quickstart/training.png"

one-billion: export DS_ACCELERATOR = cpu
one-billion: export CUDA_VISIBLE_DEVICES =
one-billion: install
	$(BIN)/egnscale data make datasets/one-billion --structures 20 --seed 0 --workers 2 --size 3x3x4 --max-steps 2 \
		--rattle 0.1 --metals Cu,Pd,Pt --adsorbates H,C,N,O,OH,CO,NO,CH,NH,N2,H2O,NH2
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/deepspeed --num_gpus 2 launch/train.py \
		--config examples/configs/one-billion.yaml

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
