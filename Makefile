# make demo: a picture on one device and on two, with times and PSNR.   make test: lint, types, import contracts, tests.
# make test-all: those that take longer, too.
# All make .venv first, with everything pinned by constraints.txt.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || command -v python)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INCOMPLETE := $(VENV)/.incomplete
# Two processes, one per core of the smallest machine that the tests are meant for.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
EIGHT := cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu
EIGHT_GPUS := cuda:0,cuda:1,cuda:2,cuda:3,cuda:4,cuda:5,cuda:6,cuda:7

.PHONY: help demo test test-all lint types imports tests benchmarks tables clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,3s/^# //p' Makefile

demo: $(INSTALLED)
	$(BIN)/asyncdiff demo

test: lint types imports tests

# Every family of pipelines in processes as well: about an hour on two cores.
test-all: lint types imports
	$(PYTEST) -m ""

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

imports: $(INSTALLED)
	$(BIN)/lint-imports --no-logo

tests: $(INSTALLED)
	$(PYTEST)

# Measures what the README and docs/benchmarks show, on this machine; best when it does nothing else.
benchmarks: $(INSTALLED)
	$(BIN)/asyncdiff demo --picture docs/images/demo.png --json docs/benchmarks/demo.json
	$(BIN)/asyncdiff bench step --arch sd21 --size 256 --devices 2 --stages 2 --json docs/benchmarks/step-sd21.json
	$(BIN)/asyncdiff bench step --arch sd21 --size 256 --dtype bfloat16 --channels-last --devices 2 --stages 2 \
		--steps 4 --json docs/benchmarks/step-sd21-channels-last.json
	$(BIN)/asyncdiff bench step --arch sdxl --size 256 --dtype bfloat16 --channels-last --devices 2 --stages 2 \
		--steps 3 --json docs/benchmarks/step-sdxl.json
	$(BIN)/asyncdiff bench --arch sd21 --size 256 --dtype float32 --devices 2 --configs 2x1 --steps 50 \
		--json docs/benchmarks/run-sd21-float32.json --csv docs/benchmarks/run-sd21-float32.csv \
		--html docs/benchmarks/run-sd21-float32.html
	$(BIN)/asyncdiff bench --arch sdxl --size 256 --dtype bfloat16 --channels-last --devices 2 --configs 2x1 \
		--steps 6 --runs 2 --json docs/benchmarks/run-sdxl.json --csv docs/benchmarks/run-sdxl.csv \
		--html docs/benchmarks/run-sdxl.html
	$(BIN)/asyncdiff bench --arch sd3 --size 256 --dtype float32 --devices 2 --configs 2x1 --steps 12 \
		--json docs/benchmarks/run-sd3.json --csv docs/benchmarks/run-sd3.csv --html docs/benchmarks/run-sd3.html
	$(BIN)/python -m asyncdiff.bench.exchange --json docs/benchmarks/exchange.json
	$(BIN)/python -m asyncdiff.bench.start_up --arch sdxl --size 64 --dtype bfloat16 --json docs/benchmarks/start-up.json
	$(BIN)/python -m asyncdiff.bench.many_runs --json docs/benchmarks/many-runs.json
	$(BIN)/python -m asyncdiff.bench.traffic --json docs/benchmarks/traffic.json
	$(BIN)/python -m asyncdiff.bench.unequal --arch sd21 --size 256 --speed 0.5 --json docs/benchmarks/unequal.json
	$(BIN)/python -m asyncdiff.bench.prediction_check --arch sd21 --size 256 --devices 2 --steps 30 \
		--json docs/benchmarks/prediction-sd21.json
	$(BIN)/asyncdiff bench step --arch sd21 --size 256 --devices 2 --guidance split \
		--json docs/benchmarks/step-sd21-split.json
	$(BIN)/asyncdiff bench step --arch sd21 --size 256 --devices 1 --guidance-refresh 2 \
		--json docs/benchmarks/step-sd21-refresh.json
	$(BIN)/python -m asyncdiff.bench.prediction_check --arch sd21 --size 256 --devices 2 --steps 50 \
		--guidance-refresh 4 --json docs/benchmarks/prediction-sd21-refresh.json
	$(BIN)/python -m asyncdiff.bench.controlnet --arch controlnet-sdxl --size 256 --dtype bfloat16 \
		--json docs/benchmarks/controlnet.json --page docs/controlnet.md
	$(BIN)/python -m asyncdiff.bench.noise_schedulers quality docs/noise-schedulers.md \
		--json docs/benchmarks/noise-schedulers.json
	$(BIN)/python -m asyncdiff.bench.quality.figures --output docs/benchmarks/fidelity.json
	$(BIN)/python -m asyncdiff.bench.quality.render docs/fidelity.md
	$(BIN)/asyncdiff plan --arch sd21 --size 512 --dtype bfloat16 --devices $(EIGHT) --profile --guidance-refresh 2,4 \
		--json docs/benchmarks/plan-sd21.json
	$(BIN)/asyncdiff plan --arch sdxl --size 1024 --dtype float16 --devices $(EIGHT_GPUS) --guidance-refresh 2,4 \
		--json docs/benchmarks/plan-sdxl.json
	$(BIN)/python -m asyncdiff.bench.choosing docs/choosing.md --plan docs/benchmarks/plan-sd21.json \
		--plan docs/benchmarks/plan-sdxl.json --fidelity docs/benchmarks/fidelity.json
	$(BIN)/python -m asyncdiff.bench.readme README.md --demo docs/benchmarks/demo.json \
		--step docs/benchmarks/step-sd21.json --step docs/benchmarks/step-sd21-split.json \
		--step docs/benchmarks/step-sd21-refresh.json --run docs/benchmarks/prediction-sd21-refresh.json

# Where real denoisers would be cut, counted on fake tensors: some minutes, no weights, no network.
tables: $(INSTALLED)
	$(BIN)/python -m asyncdiff.bench.pipelines_table docs/pipelines.md
	$(BIN)/python -m asyncdiff.bench.noise_schedulers support docs/noise-schedulers.md

# The mark .incomplete stays behind when an installation is interrupted: pip then takes half-written packages for
# installed ones, so the next attempt starts from nothing. Otherwise only what changed is installed.
$(INSTALLED): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "asyncdiff needs Python 3.11 or newer, this is " + sys.version.split()[0] + ". Use: make PYTHON=/path/to/python3.11")'
	@if [ -e $(INCOMPLETE) ]; then rm -rf $(VENV); fi
	@mkdir -p $(VENV)
	@touch $(INCOMPLETE)
	@echo "Installing into $(VENV) (minutes the first time) ..."
	@"$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[bench,dev,examples]'
	@rm $(INCOMPLETE)
	@touch $(INSTALLED)

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
