# One command per need; `make` alone lists them. Nothing has to be set up before.

PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= auto
# More arguments for pytest: make test ARGS='-k recall -x'
ARGS ?=
DEMO_ARGS ?=
# Those that run, on a CPU; the others are what they share.
BENCHMARKS ?= $(filter-out $(wildcard benchmarks/gpu*.py benchmarks/triton*.py) benchmarks/results.py,\
	$(sort $(shell grep -l __main__ benchmarks/*.py)))
# More arguments for them: make bench BENCHMARKS=benchmarks/attention.py BENCH_ARGS='--only targets'
BENCH_ARGS ?=

# What an installation is made from; the kernel is compiled on the way.
INSTALLED_FROM := pyproject.toml constraints.txt hatch_build.py \
	$(wildcard htm_pytorch/kernels/*.cpp htm_pytorch/kernels/*.h)

# Torch comes first and by its pinned version: the other packages ask for any
# torch, and would otherwise decide which build of it is fetched.
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
INSTALL = -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help check fix test test-narrow test-slow test-triton test-gpu test-minimal coverage audit \
	bench bench-gpu results demo docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z.][a-z.-]*:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.venv: .venv/.installed ## set up the environment (the other targets do it when needed)

.venv/.installed: $(INSTALLED_FROM)
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) "$(TORCH)"
	$(BIN)/python $(INSTALL) -e '.[rl,store,dev,docs]'
	@touch $@

check: .venv/.installed ## lint, formatting and types; changes no file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

fix: .venv/.installed ## repair what the linter and the formatter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: .venv/.installed ## all tests that are not slow
	$(BIN)/pytest -n $(WORKERS) --maxprocesses 8 -m 'not slow' $(ARGS)

# What arithmetic decides: with the vectors of a processor without AVX-512, where this one has more.
NARROW_TESTS ?= tests/ops tests/nn $(addprefix tests/memory/test_,\
	chunked.py chunked_parts.py ring.py steps.py homes.py index.py many.py)

test-narrow: .venv/.installed ## the tests of layers and kernels, as on a processor without AVX-512
	ATEN_CPU_CAPABILITY=avx2 $(BIN)/pytest -n $(WORKERS) --maxprocesses 8 -m 'not slow' $(NARROW_TESTS) $(ARGS)

test-slow: .venv/.installed ## the slow tests: learning, long streams, every fault of a stored memory
	$(BIN)/pytest -m slow --durations 10 $(ARGS)

# Of this process alone: what a test starts as a command of its own does not count, nor does the compiler's work.
coverage: .venv/.installed ## which lines the tests that are not slow run (htmlcov/index.html)
	$(BIN)/pytest -n $(WORKERS) --maxprocesses 8 -m 'not slow and not compile' \
		--cov --cov-report=term:skip-covered --cov-report=html $(ARGS)

# It and what it brings are needed by nothing else.
PIP_AUDIT := pip-audit==2.10.1

audit: .venv-audit/.installed ## ask pypi.org for known vulnerabilities of every pinned version
	.venv-audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip --strict

.venv-audit/.installed: Makefile
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check "$(PIP_AUDIT)"
	@touch $@

# Not in constraints.txt: a torch for CUDA asks for a Triton of its own.
TRITON := triton==3.9.0
TRITON_TESTS ?= $(wildcard tests/ops/test_triton*.py)

test-triton: .venv-triton/.installed ## the Triton kernels, interpreted and compiled for GPUs that need not be here
	.venv-triton/bin/pytest -n $(WORKERS) --maxprocesses 8 $(TRITON_TESTS) $(ARGS)

# A gigabyte, for these tests alone.
.venv-triton/.installed: $(INSTALLED_FROM)
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python $(INSTALL) "$(TORCH)"
	.venv-triton/bin/python $(INSTALL) -e '.[triton]' "$(TRITON)" einops numpy pytest pytest-xdist
	@touch $@

# The parts that promise to need torch and nothing else.
MINIMAL_TESTS ?= $(wildcard tests/test_architecture.py tests/test_public_api.py \
	tests/check tests/ops tests/nn tests/memory)

# A Python with torch, Triton, pytest, pytest-xdist and hypothesis, for a machine without a network.
GPU_PYTHON ?= $(BIN)/python

test-gpu: $(if $(filter $(BIN)/%,$(GPU_PYTHON)),.venv/.installed) ## the tests that need a CUDA device; if all pass, it is recorded as tested
	$(GPU_PYTHON) -m pytest -n $(WORKERS) --maxprocesses 8 -p no:benchmark -m gpu --record-device \
		$(MINIMAL_TESTS) $(ARGS)

test-minimal: .venv-minimal/.installed ## tests of shapes, memory, ops and nn with torch and no optional package
	.venv-minimal/bin/pytest -m 'not slow and not compile' $(MINIMAL_TESTS) $(ARGS)

.venv-minimal/.installed: $(INSTALLED_FROM)
	$(PYTHON) -m venv .venv-minimal
	.venv-minimal/bin/python $(INSTALL) "$(TORCH)"
	.venv-minimal/bin/python $(INSTALL) -e . pytest hypothesis
	@touch $@

bench-gpu: $(if $(filter $(BIN)/%,$(GPU_PYTHON)),.venv/.installed) ## the benchmark that needs a CUDA device (BENCH_ARGS=...)
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu.py $(BENCH_ARGS)

bench: .venv-bench/.installed ## run every other benchmark (BENCHMARKS=path for one, BENCH_ARGS=...)
	@set -e; for file in $(BENCHMARKS); do \
		echo "== $$file"; .venv-bench/bin/python $$file $(BENCH_ARGS); \
	done

.venv-bench/.installed: $(INSTALLED_FROM)
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python $(INSTALL) "$(TORCH)"
	.venv-bench/bin/python $(INSTALL) -e '.[bench,rl,store]'
	@touch $@

# One of them: make results TASK=t-maze MEMORY=htm SEED=0
results: .venv-results/.installed ## train every task with every memory and write docs/results.md (hours; goes on where it was)
	.venv-results/bin/python benchmarks/results.py \
		$(if $(TASK),--task $(TASK)) $(if $(MEMORY),--memory $(MEMORY)) $(if $(SEED),--seed $(SEED))

.venv-results/.installed: $(INSTALLED_FROM)
	$(PYTHON) -m venv .venv-results
	.venv-results/bin/python $(INSTALL) "$(TORCH)"
	.venv-results/bin/python $(INSTALL) -e '.[rl,tasks]'
	@touch $@

demo: .venv-demo/.installed ## train a small agent and watch it learn to remember (runs/demo)
	.venv-demo/bin/htm train ballet --run-dir runs/demo --resume $(DEMO_ARGS)

.venv-demo/.installed: $(INSTALLED_FROM)
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python $(INSTALL) "$(TORCH)"
	.venv-demo/bin/python $(INSTALL) -e '.[rl]'
	@touch $@

docs: .venv/.installed ## build the documentation (docs/_build/html/index.html); warnings are errors
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env docs docs/_build/html

clean: ## remove environments, caches and build products; keeps runs/
	rm -rf .venv .venv-audit .venv-bench .venv-demo .venv-minimal .venv-results .venv-triton build dist docs/_build *.egg-info
	rm -f htm_pytorch/kernels/recall-*
	rm -rf .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
