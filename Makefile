# `make` alone lists what can be made. The virtual environment .venv is made by the first target that needs it.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help train demo test test-oldest test-long test-faults lint bench check-recipes tensorboard clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

train: $(VENV)/.installed  ## a first run: a ViT learns handwritten digits in a minute, no data to download
	$(RUN) train.py experiment=digits

DEMO := outputs/demo
demo: $(VENV)/.installed  ## look into a model in the browser: attention, heads; trains on digits first where it has to
	@test -e $(DEMO)/checkpoints/best.safetensors || $(RUN) train.py experiment=digits hydra.run.dir=$(DEMO)
	$(RUN) -m vit.explore $(DEMO)/checkpoints/best.safetensors --out $(DEMO)/explorer.html \
		--also $(DEMO)/checkpoints/previous.safetensors
	@$(RUN) -m webbrowser "file://$(CURDIR)/$(DEMO)/explorer.html" >/dev/null 2>&1 || true
	@echo "the page: $(CURDIR)/$(DEMO)/explorer.html"

test: $(VENV)/.installed-dev  ## the tests, ten minutes on two cores, no network
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

# What a user of an older machine has. Those versions have wheels for Python 3.10 to 3.12
OLDEST := .venv-oldest
test-oldest: $(OLDEST)/.installed  ## the tests with the oldest versions that requirements.txt allows
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist worksteal

test-long: $(VENV)/.installed-dev  ## tests with many processes that `make test` leaves out; some minutes
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal -m long

test-faults: $(VENV)/.installed-dev  ## kills, damaged and hostile files, mistakes by the hundred; one to two hours
	$(RUN) tests/faults

lint: $(VENV)/.installed-dev  ## ruff and pyright
	$(RUN) -m ruff format --check train.py evaluate.py vit tests benchmarks
	$(RUN) -m ruff check .
	$(RUN) -m pyright

bench: $(VENV)/.installed-dev  ## steps of training and inference against four other projects, in turn; half an hour
	$(RUN) benchmarks/speed.py --out outputs/speed.md

check-recipes: $(VENV)/.installed  ## retrain digits and two cuts of CIFAR-10 recipes; fails below stated accuracies
	$(RUN) benchmarks/check_recipes.py

tensorboard: $(VENV)/.installed  ## the curves of all runs, in a browser
	$(VENV)/bin/tensorboard --logdir outputs

clean:  ## remove the virtual environment and caches; data/ and outputs/ stay
	rm -rf $(VENV) $(OLDEST) .pytest_cache .ruff_cache

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(OLDEST)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(OLDEST)
	sed -E 's/>=([0-9.]+).*/==\1/' requirements.txt > $(OLDEST)/oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c $(OLDEST)/oldest.txt -r requirements-dev.txt
	touch $@
