# Each target is one line that a person could type. `make demo` and `make test` set up everything they need.
SEED ?= 7
DATA ?=
PY = .venv/bin/python
export OMP_NUM_THREADS ?= 1
export RAY_AUTH_MODE ?= disabled
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: setup demo test check bench schema

setup: .venv/.ready

.venv/.ready: pyproject.toml requirements/cpu.txt
	python3.11 -m venv .venv
	$(PY) -m pip install -q torch==2.13.0
	$(PY) -m pip install -q -r requirements/cpu.txt
	$(PY) -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(PY) launch/demo.py --seed $(SEED) $(if $(DATA),--data $(DATA))

# Three commands: the fast part; launchers, ranks and injected faults; Ray alone, in a process of its own. Two files at a time.
test: setup
	$(PY) -m pytest -n 2 --dist loadfile -m "not bench and not gpu and not multiproc and not faults and not slow"
	$(PY) -m pytest -n 2 --dist loadfile -m "(multiproc or slow or faults) and not bench and not gpu" --ignore tests/multiproc/test_stream_ray.py
	$(PY) -m pytest tests/multiproc/test_stream_ray.py

check: setup
	ruff format --check . && ruff check . && pyright && lint-imports

bench: setup
	$(PY) -m pytest -m bench tests/bench

schema: setup
	$(PY) -c "import json; from hermes_dist.config import Config; print(json.dumps(Config.model_json_schema(), indent=1))" > configs/schema.json
