# Everything that the README promises, in one file. Needs Linux, Python 3.11+, git, make and g++; the rest is installed.

PYTHON ?= python3
# `make test RAY=newest` (or a version) tests with another Ray than the pinned one, in an environment of its own
RAY ?=
VENV ?= .venv$(if $(RAY),-ray-$(RAY))
OTHER_RAY = ray[data,default,train,tune]$(if $(filter-out newest,$(RAY)),==$(RAY))
BIN := $(VENV)/bin
# litgpt's own requirements exclude today's huggingface-hub; what is measured needs these only
LITGPT := litgpt==0.5.13 lightning==2.6.6 lightning-utilities==0.15.3 torchmetrics==1.9.0
STUDY_ARGS ?=
GROUPS ?=
FUZZ_EXAMPLES ?= 20000
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# All of them, so that constraints.txt covers whatever can be installed.
EXTRAS := corpora,dev,harness,s3,tuning,wandb

.PHONY: constraints help study dashboard test test-slow gpu fuzz bench check typed browser slurm image down clean

help: ## show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing haltscale into $(VENV) (several minutes at the first time)"
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[corpora]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what the tests need"
	$(PIP_INSTALL) --editable '.[corpora,dev,s3,tuning]'
	$(if $(RAY),$(BIN)/python -m pip install --quiet --upgrade '$(OTHER_RAY)')
	@touch $@

study: $(VENV)/.installed ## run the quickstart on a local Ray head and show its results
	@$(BIN)/haltscale up
	@$(BIN)/haltscale submit quickstart $(if $(STUDY_ARGS),-- $(STUDY_ARGS))

dashboard: $(VENV)/.installed ## look at the studies in a browser
	@$(BIN)/haltscale dashboard

down: $(VENV)/.installed ## stop the local Ray head
	@$(BIN)/haltscale down

browser: # the page tests need a Chromium; without one, and without the right to install it, they are skipped and say so
	@command -v chromium chromium-browser google-chrome >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null 2>&1 \
	|| echo "no Chromium found: the browser tests will be skipped (install it with your package manager)"

slurm: # the tests of deploy/slurm.sh need Debian's Slurm; without it, and without the right to install it, they are skipped and say so
	@PATH=$$PATH:/usr/sbin command -v slurmctld slurmd munged >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >/dev/null 2>&1 \
	|| echo "no Slurm found: its tests will be skipped (install slurm-wlm and munge with your package manager)"

image: ## build the container image (TORCH_INDEX=https://download.pytorch.org/whl/cu128 for CUDA)
	docker build -f deploy/Dockerfile -t haltscale $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) .

test: $(VENV)/.installed-dev browser ## install what is missing and run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not (slow or gpu or ray or browser)'
	$(BIN)/python -m pytest -m '(ray or browser) and not (slow or gpu)'

test-slow: $(VENV)/.installed-dev browser slurm ## run the long tests
	$(BIN)/python -m pytest -m 'slow and not gpu'

gpu: $(VENV)/.installed-dev ## on a machine with a CUDA device: prove that it is right there, and how fast
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("no CUDA device that this PyTorch can use: nothing was run")'
	DS_ACCELERATOR=cuda $(BIN)/python -m pytest -m 'gpu and not slow' --timeout=120 tests/model tests/platform
	$(BIN)/python benchmarks/gpu.py

fuzz: $(VENV)/.installed-dev ## search for failures for a night (FUZZ_EXAMPLES=200 for a few minutes)
	OMP_NUM_THREADS=1 FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest tests/fuzz --hypothesis-profile=fuzz --timeout=0

bench: $(VENV)/.installed-dev ## measure everything and write benchmarks/RESULTS.md (GROUPS="models data" for some)
	@$(PIP_INSTALL) --no-deps $(LITGPT) || echo "litgpt cannot be installed: it will not be measured"
	$(BIN)/python benchmarks/run.py $(GROUPS)

constraints: ## update constraints.txt to the newest versions that fit together (torch stays; edit its line to change it)
	$(PYTHON) -m venv --clear $(VENV)-constraints
	$(VENV)-constraints/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(VENV)-constraints/bin/python -m pip install --quiet '.[$(EXTRAS)]' setuptools-scm
	{ grep '^#' constraints.txt; \
	  $(VENV)-constraints/bin/python -m pip freeze --exclude haltscale | sed -E 's/\+[a-z0-9.]+$$//' | grep -vE '^(nvidia|cuda|triton)' | sort -f; \
	} > constraints.new && mv constraints.new constraints.txt
	rm -rf $(VENV)-constraints

# Type checker and import linter read the rooms under their import name.
typed:
	@mkdir -p .typed/haltscale
	@for room in model platform studies dashboard; do ln -sfn ../../$$room .typed/haltscale/$$room; done

check: $(VENV)/.installed-dev typed ## lint, types, import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	PYTHONPATH=.typed $(BIN)/lint-imports --no-logo

clean: ## remove what make installed (results stay)
	rm -rf $(VENV) $(VENV)-constraints .typed build *.egg-info
