# SPDX-License-Identifier: Apache-2.0
#
# A thin front for CMake, CTest and pytest. `make demo` and `make test` do their own set-up.

BUILD   ?= build
JOBS    ?= $(shell nproc)
VENV    ?= .venv
PYTHON  ?= python3
PACKAGES = gcc g++ make cmake pkg-config libcjson-dev python3-venv

MAKEFLAGS += --no-print-directory

# Under make -j the builds called from here share its jobs; otherwise each takes every core.
BUILD_JOBS = $(if $(findstring jobserver,$(MAKEFLAGS)),,-j $(JOBS))

# Seconds after which a test is taken to hang; the slowest takes two minutes on two busy cores.
HANGS = 900

TRUST = asan coverage valgrind tsan fuzz reproduce torch

.PHONY: help all demo test test-c test-python test-trust test-aarch64 campaign bench install clean setup
.PHONY: python-package $(TRUST:%=trust-%)

help:
	@echo "make demo        build, and see the operator choose keys on a 32K-token context"
	@echo "make test        build and run every test that this machine can"
	@echo "make bench       time the operator beside its peak, torch, oneDNN and libxsmm; bench/results/"
	@echo "make campaign    the long tests: sanitizers, fuzzing, 50,000 random cases"
	@echo "make install     PREFIX=/usr/local, through CMake"

# Installs what is missing when it may, or else says how.
setup:
	@sh scripts/setup.sh $(PACKAGES)

$(BUILD)/CMakeCache.txt: | setup
	cmake --preset release -B $(BUILD) $(if $(CI),-DLIDX_WERROR=ON)

all: $(BUILD)/CMakeCache.txt
	+cmake --build $(BUILD) $(BUILD_JOBS)

# The demo runs on the CPU. It has a build of its own without the CUDA kernels, over which nvcc takes
# minutes.
$(BUILD)-demo/CMakeCache.txt: | setup
	cmake --preset release -B $(BUILD)-demo -DLIDX_CUDA=OFF -DLIDX_TESTS=OFF

demo: $(BUILD)-demo/CMakeCache.txt
	+cmake --build $(BUILD)-demo $(BUILD_JOBS) --target lidx
	$(BUILD)-demo/tools/lidx demo

test: test-c test-python test-trust

test-c: all
	ctest --test-dir $(BUILD) -j $(JOBS) --timeout $(HANGS) --output-on-failure

# Python compiles what the tests import of it; pip would compile everything, which takes longer.
$(VENV)/ready: tests/requirements.txt | setup
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --no-compile -r tests/requirements.txt
	touch $@

# The wheel is built and installed as by a user, but for the CUDA kernels, which were built above. The
# tests run against what is installed, and look into the wheel itself.
python-package: $(VENV)/ready
	rm -rf $(BUILD)/wheel
	$(VENV)/bin/pip wheel -q --no-build-isolation --no-deps -w $(BUILD)/wheel \
	    --config-settings=cmake.define.LIDX_CUDA=OFF .
	$(VENV)/bin/pip install -q --no-deps --force-reinstall $(BUILD)/wheel/*.whl

test-python: all python-package
	LIDX_BIN=$(BUILD)/tools/lidx LIDX_WHEEL=$$(echo $(BUILD)/wheel/*.whl) \
	    $(VENV)/bin/python -m pytest -q -rs -o faulthandler_timeout=$(HANGS) tests

test-trust: $(TRUST:%=trust-%)

# Configured before these begin: make takes what is ready in turn, and what is longest under way, the
# CUDA kernels and then the Python tests, must not come last.
trust-torch: python-package
$(TRUST:%=trust-%) test-aarch64: | $(BUILD)/CMakeCache.txt
$(TRUST:%=trust-%):
	+@sh tests/campaign.sh quick $(@:trust-%=%)

# Cross build for 64-bit ARM, the C tests under user-mode emulation. test_scale stays out: a million
# keys take an emulator too long.
test-aarch64:
	@sh scripts/setup.sh gcc-aarch64-linux-gnu qemu-user
	cmake -B build-aarch64 -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake -DLIDX_WERROR=ON \
	      -DLIDX_TOOLS=OFF -DLIDX_CUDA=OFF
	+cmake --build build-aarch64 $(BUILD_JOBS)
	LIDX_TEST_CASES=60 ctest --test-dir build-aarch64 -j $(JOBS) --timeout $(HANGS) \
	    --output-on-failure --exclude-regex test_scale

campaign: all
	+sh tests/campaign.sh long

# RESULT names this machine's result files. oneDNN and libxsmm take part if they are installed:
# apt-get install libdnnl-dev libxsmm-dev
RESULT ?= local
bench: all $(VENV)/ready
	cmake --build $(BUILD) -j $(JOBS) --target bench_cpu_rivals
	$(BUILD)/tools/lidx bench --json > bench/results/$(RESULT).json
	$(BUILD)/bench/bench_cpu_rivals --out bench/results/$(RESULT)-rivals.json
	$(VENV)/bin/python bench/bench_cpu_torch.py --library $(BUILD)/liblightning_indexer.so \
	    --seconds 2 --out bench/results/$(RESULT)-torch.json
	$(VENV)/bin/python bench/bench_cpu_torch.py --library $(BUILD)/liblightning_indexer.so --threads 1 \
	    --case hot --case "64 x" --seconds 2 --out bench/results/$(RESULT)-torch-1.json
	$(VENV)/bin/python bench/plot_results.py bench/results $(RESULT)

install: all
	cmake --install $(BUILD) --prefix $(or $(PREFIX),/usr/local)

clean:
	rm -rf $(BUILD) $(BUILD)-demo build-* $(VENV)
