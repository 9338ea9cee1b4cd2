# One environment, .venv, for everything. `make demo` and `make test` do all the set-up.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready
LOWEST := .venv-lowest
SLOW := slow or exhaustive

# What the libraries are used for: images, models, caches, commands, pages, event files, training.
QUICK := tests/inputs/test_datasets.py tests/inputs/test_hf.py tests/inputs/test_models.py \
    tests/cache/test_store.py tests/pipeline/test_cli.py tests/pipeline/test_config.py \
    tests/pipeline/test_report.py tests/training/test_events.py tests/test_cache_teacher.py \
    tests/test_train_student.py tests/test_lowest_versions.py

.PHONY: demo test slow lowest check format bench clean

demo: $(READY)
	$(BIN)/pipeline demo --out demo-out --overwrite

# Two processes of one thread each: threads that share two cores cost more than they give.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# SLOW=slow leaves out what takes tens of minutes.
slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "$(SLOW)"

# The lowest versions that pyproject.toml allows; old libraries may warn.
lowest: $(LOWEST)/.ready
	OMP_NUM_THREADS=1 $(LOWEST)/bin/pytest -n 2 --dist loadfile -o filterwarnings= $(QUICK)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/python -m benchmarks.suite

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

$(LOWEST)/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST) || python3 -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check \
	    -c constraints-lowest.txt -e '.[clip,hf,remote,tensorboard,timm,transformers]' \
	    hypothesis pytest pytest-timeout pytest-xdist xarray
	touch $@

clean:
	rm -rf .venv $(LOWEST) demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
