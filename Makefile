# Needs python3, pip and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench bench-adapters bench-quality peers conformance clean

demo: .venv/.ready
	$(BIN)/hf-modular demo --output demo-output

test: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# About an hour; the models to merge take 6 GB, best on a file system in memory.
BENCH_MODELS ?= .peers/merge-bench
bench: bench-adapters
	test -d $(BENCH_MODELS) || $(BIN)/python benchmarks/make_models.py $(BENCH_MODELS)
	$(BIN)/python benchmarks/merge.py $(BENCH_MODELS)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/adapter_merging.py

# About three hours on one core; finished trainings are kept in .peers, and a broken run goes on where it was.
bench-quality: .venv/.ready
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r benchmarks/requirements.txt
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/quality.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/merging_quality.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/rmm_quality.py

# About twenty minutes on one core, and five for many adapters; a run that was cut goes on where it was, FRESH=1 starts
# anew, QUICK=1 takes about five minutes.
bench-adapters: .venv/.ready
	$(BIN)/python benchmarks/adapters.py $(if $(QUICK),--quick) $(if $(FRESH),--fresh)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/many_adapters.py $(if $(QUICK),--adapters 8 --output .peers)

# PEFT's own tests on our adapter methods; BASELINE=1 runs PEFT's LoRA and HiRA beside them.
conformance: .venv/.ready
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m conformance.run $(if $(BASELINE),--baseline --write benchmarks/conformance.md)

# torch first and alone: the pinned build is then kept by everything that comes after it.
.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

# What others have made, to compare with: each in an environment of its own, never needed by `make test`.
peers: .peers/mergekit/.ready

.peers/mergekit/.ready: constraints.txt
	test -x .peers/mergekit/bin/python || $(PYTHON) -m venv .peers/mergekit
	.peers/mergekit/bin/python -m pip install --quiet -c constraints.txt torch
	.peers/mergekit/bin/python -m pip install --quiet --upgrade mergekit
	touch $@

clean:
	rm -rf .venv .peers demo-output
