# Every target sets up .venv first if it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
SHELL := /bin/bash

# one worker per core, each with one thread
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
BENCHES := kernels passes data step peers embed ranks collectives
INTERPRETED := $(addprefix tests/kernels/test_,triton.py augment_triton.py norm_pool.py)

.PHONY: quickstart test test-long check interpret lint format docs schema bench gpu soak clean

quickstart: $(STAMP)
	@$(BIN)/isofast prepare digits --root data/digits
	@$(BIN)/python -m deepspeed.launcher.runner --log_level warning --num_accelerators 1 launch/train.py --config launch/quickstart.json

test: lint
	$(PYTEST) -m "not long"

check: lint
	$(PYTEST) -m "not slow and not long"

# whole runs: several hosts, kills, compilation, tables
test-long: $(STAMP)
	$(PYTEST) -m long

# the Triton kernels on a CPU
interpret: $(STAMP)
	TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= $(PYTEST) $(INTERPRETED)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

schema: $(STAMP)
	$(BIN)/python -c "from isofast.config.schema import schema_json; print(schema_json(), end='')" > launch/config.schema.json

# goes on after a failure. bench/start_up.py needs a folder, bench/gpu_day.py a GPU
bench: $(STAMP)
	@$(MAKE) --no-print-directory --keep-going --jobs=1 $(BENCHES:%=bench-%)

bench-%: $(STAMP)
	$(BIN)/python bench/$*.py

# tests, benchmarks and short runs on a GPU, in half an hour; resumes where it was stopped
gpu: $(STAMP)
	$(BIN)/python bench/gpu_day.py --output runs/gpu-day

# kills runs at random moments and compares their results; 25 minutes
soak: $(STAMP)
	$(BIN)/python -m tests.soak

clean:
	rm -rf $(VENV) build *.egg-info kernels/build kernels/*.egg-info

$(STAMP): pyproject.toml kernels/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"isofast needs Python 3.11 or newer, and {sys.executable} is {v[0]}.{v[1]}. Try: make PYTHON=python3.12")'
	@echo "setting up $(VENV): 6 GB, a few minutes"
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ./kernels --editable ".[dev]"
	@mkdir -p $(VENV)/typing && ln -sfn ../../kernels $(VENV)/typing/isofast_kernels
	@touch $@
