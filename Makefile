# make demo    set up and run the three tasks on real images
# make test    set up and run the tests
# An existing environment serves as well, untouched: make test ENV_PYTHON=/path/to/python

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
MMCV ?= lite
# How pytest-xdist spreads the tests; empty for one process
WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder
export MMVMAMBA_BUILD

ifdef ENV_PYTHON
SETUP :=
else
ENV_PYTHON := $(VENV)/bin/python
SETUP := setup
# set-up leaves compiling Python to the first import; each of a hundred processes would compile all of torch again
unexport PYTHONDONTWRITEBYTECODE
endif

CXX_FILES = $(shell find ops/csrc mmvmamba/export docs/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
CLANG_FORMAT = "$(ENV_PYTHON)" -c 'import clang_format; clang_format.clang_format()'

.PHONY: help setup wheels demo gallery figures matrix docs docs-test test test-all dist lint ruff clang-format codespell types format clean soak
.DEFAULT_GOAL := help

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup:  ## Make .venv with the tested set (PYTHON=, VENV= choose interpreter, folder; MMCV=compiled builds mmcv's ops)
	@test -n "$(PYTHON)" || { echo 'error: no python3 on PATH; install Python 3.11 or set PYTHON='; exit 1; }
	@"$(PYTHON)" tools/setup_env.py --venv "$(VENV)" --mmcv "$(MMCV)"

wheels: $(SETUP)  ## Build a wheel for the installed torch, and for all GPUs where nvcc is, into dist/
	MMVMAMBA_WHEEL=1 MMVMAMBA_BUILD="$(or $(MMVMAMBA_BUILD),cuda)" \
		"$(ENV_PYTHON)" -m pip wheel --no-build-isolation --no-deps -w dist .

demo: $(SETUP)  ## Train and evaluate a classifier, a detector and a segmentor on the digits data set
	"$(ENV_PYTHON)" tools/demo.py $(DEMO_OPTIONS)

gallery: $(SETUP)  ## Make every picture of the documentation's gallery from what the demo trained
	"$(ENV_PYTHON)" -W ignore tools/analysis/gallery.py --force $(GALLERY_OPTIONS)

figures: $(SETUP)  ## Render the tables and plots of README and docs from benchmarks/results/
	"$(ENV_PYTHON)" tools/benchmark/figures.py

matrix: $(SETUP)  ## Try eight environments, Python 3.10 to 3.14 and torch 2.4 to 2.15, and write benchmarks/results/matrix.json
	"$(ENV_PYTHON)" tools/benchmark/matrix.py

docs: $(SETUP)  ## Build the documentation into build/docs; a dead link fails
	"$(ENV_PYTHON)" -m mkdocs build --strict

docs-test: docs  ## Open every page of the documentation in headless Chromium, wide and narrow
	"$(ENV_PYTHON)" tools/docs/check_pages.py build/docs

dist: $(SETUP)  ## Build the sdist and a wheel into dist/, and check both in fresh environments
	"$(ENV_PYTHON)" tools/dist.py

test: $(SETUP)  ## Run the tests
	"$(ENV_PYTHON)" -m pytest -m 'not slow' $(WORKERS)

test-all: $(SETUP)  ## Run the slow tests too
	"$(ENV_PYTHON)" -m pytest $(WORKERS)

soak: $(SETUP)  ## Alternate tasks, sizes and precisions for 20 minutes and watch the memory
	"$(ENV_PYTHON)" tools/soak.py --minutes 20

lint: ruff clang-format codespell types docs  ## Every check that runs nothing: style, spelling, types, documentation

ruff: $(SETUP)  ## Check the Python code's style and format
	"$(ENV_PYTHON)" -m ruff check .
	"$(ENV_PYTHON)" -m ruff format --check .

clang-format: $(SETUP)  ## Check the C++ code's format
	@$(CLANG_FORMAT) --dry-run -Werror $(CXX_FILES)

codespell: $(SETUP)  ## Check the spelling in code and documentation
	"$(ENV_PYTHON)" -m codespell_lib

types: $(SETUP)  ## Check the types (a link shows the checker ops/ as mmvmamba.ops)
	@rm -rf build/types && mkdir -p build/types/mmvmamba
	@ln -s "$(CURDIR)"/mmvmamba/* "$(CURDIR)/ops" build/types/mmvmamba/
	"$(ENV_PYTHON)" -m mypy

format: $(SETUP)  ## Format the code
	"$(ENV_PYTHON)" -m ruff check --fix .
	"$(ENV_PYTHON)" -m ruff format .
	@$(CLANG_FORMAT) -i $(CXX_FILES)

clean:  ## Remove what was built, but neither data nor results
	rm -rf build *.egg-info ops/_C*.so mmvmamba/export/onnxruntime/*.so mmvmamba/export/openvino/*.so ops/_build_info.json mmvmamba/.mim .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
