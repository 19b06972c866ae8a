# `make demo` and `make test` do everything, on a machine with Python >= 3.10 and a C++ compiler:
# they make .venv, install torch and the package with its tools, and run. What is up to date is left
# alone. Two choices:   make test PYTHON=python3.12 TORCH="torch==2.13.0"

PYTHON ?= python3
TORCH ?= torch>=2.11
PYTEST_ARGS ?= -n 2 --dist loadgroup
MINUTES ?= 30

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(wildcard csrc/*.* csrc/*/*.*)
CXX_FILES := $(filter %.h %.inl %.cpp %.cu %.cuh,$(NATIVE) $(wildcard tests/cuda_*/* tests/cpu_kernels/*))

# What `make gpu` runs: a Python that has torch with CUDA and pytest.
GPU_PYTHON ?= python3

# Groups of tests by name: make test-distributed, make test-clients, …
GROUPS := distributed clients nn cuda_emulator examples

# The examples whose reports stand in docs/applications; each takes up to ten minutes.
APPLICATIONS := image_gan text_to_image_gan video_gan uncertainty robust_classifier norms

.PHONY: help demo applications $(APPLICATIONS) test $(GROUPS:%=test-%) lint format bench bench-plots gpu gpu-smoke sanitize fuzz docs pictures dist clean FORCE
.DELETE_ON_ERROR:

help:  ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/installed  ## train a GAN on digits twice, stock and fused (DEMO_ARGS="--steps 200")
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

applications: $(APPLICATIONS)  ## run the examples that have a report in docs/applications, or one: make image_gan

$(APPLICATIONS): $(VENV)/installed
	$(BIN)/python examples/$@.py --out docs/applications/$@ $(EXAMPLE_ARGS)

test: lint $(VENV)/clients.json  ## lint, then all tests (PYTEST_ARGS="-k copies" chooses some; test-nn, test-distributed, …: a folder)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

$(GROUPS:%=test-%): test-%: $(VENV)/installed  ## the tests of one folder
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/$*

test-clients: $(VENV)/clients.json

fuzz: $(VENV)/installed  ## compare fused models with PyTorch's through random operations (MINUTES=30, FUZZ_ARGS="--seed 1")
	$(BIN)/python tests/fuzz/long_run.py --minutes $(MINUTES) $(FUZZ_ARGS)
	$(BIN)/python tests/fuzz/malformed_calls.py --minutes $$(awk 'BEGIN { print $(MINUTES) / 10 }')

bench: $(VENV)/installed  ## measure against others (BENCH_ARGS="headline" for a part), or AGAINST=a commit ("--at-most 1.03" fails if slower)
	$(if $(AGAINST),$(BIN)/python bench/compare.py $(AGAINST) $(BENCH_ARGS),\
	  $(BIN)/python bench/run.py $(BENCH_ARGS) && $(BIN)/python bench/plot.py)

bench-plots: $(VENV)/installed  ## draw what was measured: pictures, and the tables of README and docs
	$(BIN)/python bench/plot.py

gpu:  ## build, test and measure on the NVIDIA GPU here, in 8 minutes (DRY_RUN=1 without a GPU)
	$(GPU_PYTHON) bench/gpu/run.py $(if $(DRY_RUN),--dry-run)

gpu-smoke:  ## the essential half of it, in 2 minutes
	$(GPU_PYTHON) bench/gpu/run.py --smoke $(if $(DRY_RUN),--dry-run)

sanitize: $(VENV)/installed  ## numbers, malformed calls and memory of the CPU library under AddressSanitizer and UBSan (15 minutes)
	$(BIN)/python tests/sanitize.py

lint: $(VENV)/installed  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/installed  ## bring all files into the style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(VENV)/installed  ## build the site of the documentation into out/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

pictures: $(VENV)/installed  ## draw the pictures of docs/how_it_works.md anew
	$(BIN)/python docs/draw.py

# Without isolation: the native library is for the torch that it is compiled against, and an isolated
# build would have none, or another one than its user.
dist: $(VENV)/installed  ## build source distribution and wheel into dist/, then install and use both
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/installation.py dist/*

clean:  ## remove what was built; .venv stays, and the next make builds again
	rm -rf build dist out *.egg-info spectral_ext/_C.*so $(VENV)/installed

# The package is installed editable: tests and examples run the compiled library of this tree, and
# only native code and metadata need a new installation when they change.
$(VENV)/installed: $(VENV)/torch pyproject.toml setup.py build_config.py $(NATIVE)
	@echo "Installing spectral_ext; compiling takes about a minute."
	@$(PIP) install --quiet $$(sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	@$(PIP) install --quiet --no-build-isolation --editable ".[dev]"
	@$(BIN)/python -m spectral_ext
	@touch $@

# Packages of other people, each installed by itself: what fails is in this file, and in the tests' summary.
$(VENV)/clients.json: tests/clients/clients.py tests/clients/install.py $(VENV)/installed
	@$(BIN)/python tests/clients/install.py

# Looked at every time, since TORCH may ask for another version than the one that is there. A stamp
# that stays as old as it was makes nothing else out of date.
$(VENV)/torch: FORCE $(BIN)/pip
	@$(BIN)/python -c "$$TORCH_IS_THERE" $(firstword $(TORCH_WORDS)) || \
	  { echo "Installing $(TORCH)."; $(PIP) install --quiet $(TORCH_WORDS) && touch $@; }
	@test -e $@ || touch $@

# Quoted one by one: a version may hold a `>`, and TORCH options ("torch --index-url https://…").
TORCH_WORDS = $(foreach word,$(TORCH),'$(word)')

define TORCH_IS_THERE
import importlib.metadata as metadata, sys
from pip._vendor.packaging.requirements import Requirement
wanted = Requirement(sys.argv[1])
try:
    there = wanted.specifier.contains(metadata.version(wanted.name), prereleases=True)
except metadata.PackageNotFoundError:
    there = False
sys.exit(not there)
endef
export TORCH_IS_THERE

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "spectral_ext needs Python >= 3.10; name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "This Python cannot make virtual environments (Debian: apt install python3-venv)."; exit 1; }
	$(PYTHON) -m venv $(VENV)
