# InvDiff-PL. `make` alone lists the targets; every variable may be given on the command line.
SHELL := /bin/bash

EXP      ?= waterbirds
SCALE    ?= mini
DATA     ?=
PROMPTS  ?=
BACKBONE ?=
FAMILY   ?=
DEVICES  ?=
NUM_NODES ?=
LAUNCHER ?=
RUN_DIR  ?= runs/$(EXP)/$(SCALE)
SEED     ?= 0
ARGS     ?=
DEVICE   ?= cpu
# Words of the shell: a folder with a space is quoted in it, RUNS="'runs/my birds' runs/b".
RUNS     ?= $(call quote,$(RUN_DIR))
OUTPUT   ?= $(RUN_DIR)/export

PYTHON3  ?= python3.11
VENV     ?= .venv
PYTHON   := $(VENV)/bin/python
READY    := $(VENV)/.installed

# A value as one word of the shell, whatever it holds.
quote = '$(subst ','\'',$(1))'

WHERE = $(if $(DEVICES),--devices $(call quote,$(DEVICES))) \
  $(if $(NUM_NODES),--num-nodes $(NUM_NODES)) $(if $(LAUNCHER),--launcher $(call quote,$(LAUNCHER)))
NAMED = --experiment $(call quote,$(EXP)) --scale $(call quote,$(SCALE)) \
  $(if $(DATA),--data $(call quote,$(DATA)))
OPTIONS = $(NAMED) --run-dir $(call quote,$(RUN_DIR)) \
  $(if $(BACKBONE),--backbone $(call quote,$(BACKBONE))) \
  $(if $(FAMILY),--family $(call quote,$(FAMILY))) \
  $(if $(PROMPTS),--prompts $(call quote,$(PROMPTS))) \
  $(WHERE) --seed_everything=$(SEED) $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup train augment compare docs backbone check-data sweep export ablation evidence peers bench tensorboard verify replay test test-slow soak lint format type clean

help: ## list the targets and variables
	@echo "targets:"
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1|\2/' | column -t -s '|'
	@echo
	@echo "variables (now):"
	@echo "  EXP="$(call quote,$(EXP))"           experiment, a file in experiments/"
	@echo "  SCALE="$(call quote,$(SCALE))"               a file in experiments/scales/"
	@echo "  DATA="$(call quote,$(DATA))"                    folder of the data set; drawn stand-ins if empty"
	@echo "  PROMPTS="$(call quote,$(PROMPTS))"                 of EXP=prompts: a list, a file, or \"a; b\"; no data set is needed"
	@echo "  BACKBONE="$(call quote,$(BACKBONE))"                pipeline folder or hub id; the shipped one if empty"
	@echo "  FAMILY="$(call quote,$(FAMILY))"                  of a new backbone: sd if empty, or sana, a flow-matching transformer"
	@echo "  DEVICE="$(call quote,$(DEVICE))"                 of bench: cpu or cuda"
	@echo "  DEVICES="$(call quote,$(DEVICES))"                 devices a node, as Lightning takes them"
	@echo "  NUM_NODES="$(call quote,$(NUM_NODES))"                number of machines; needs LAUNCHER, see docs/cluster.md"
	@echo "  LAUNCHER="$(call quote,$(LAUNCHER))"                 starts a stage's processes, such as srun; one machine needs none"
	@echo "  RUN_DIR="$(call quote,$(RUN_DIR))"  run folder"
	@echo "  RUNS="$(call quote,$(RUNS))"     run folders to sweep"
	@echo "  OUTPUT="$(call quote,$(OUTPUT))"  folder to export to"
	@echo "  SEED="$(call quote,$(SEED))"                   of everything random"
	@echo "  ARGS="$(call quote,$(ARGS))"                    Lightning CLI overrides, such as --model.lambda_=10"

$(READY): pyproject.toml constraints.txt
	@test -x $(PYTHON) || $(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(READY) ## create the environment (.venv) with the pinned versions

train: setup ## the whole experiment: environments, adapter, samples, report
	$(PYTHON) -m invdiff_pl train $(OPTIONS)

augment: setup ## train, and a classifier with the debiased samples: accuracy in its worst group
	$(PYTHON) -m invdiff_pl augment $(OPTIONS)

compare: setup ## figures of several runs in one table: RUNS="runs/a/mini runs/b/mini"
	$(PYTHON) -m invdiff_pl compare $(RUNS) $(ARGS)

backbone: setup ## train a small backbone, or fine-tune BACKBONE, on the data set and measure its bias
	$(PYTHON) -m invdiff_pl backbone $(OPTIONS)

check-data: setup ## look over the data set DATA of EXP: what is there, what to fix
	$(PYTHON) -m invdiff_pl check $(NAMED) $(ARGS)

sweep: setup ## bias against quality over invariant and guidance scales, of RUNS="a b"
	$(PYTHON) -m invdiff_pl sweep --runs $(RUNS) $(ARGS)

export: setup ## write backbone, adapter and model card of RUN_DIR into the folder OUTPUT
	$(PYTHON) -m invdiff_pl export --run-dir $(call quote,$(RUN_DIR)) --output $(call quote,$(OUTPUT))

ablation: setup ## what each part of the method is worth, on the run in RUN_DIR (hours)
	$(PYTHON) benchmarks/ablation.py $(call quote,$(RUN_DIR)) $(ARGS)

evidence: setup ## make the main figures of README and docs anew, in ./evidence (many hours); goes on where it stopped
	$(PYTHON) benchmarks/evidence.py $(ARGS)

peers: setup ## other methods on the run in RUN_DIR; ARGS=--prompts-run=RUN adds those from prompts alone
	$(PYTHON) benchmarks/peers.py $(call quote,$(RUN_DIR)) $(ARGS)

bench: setup ## every stage against the reference's recipe, in one run; DEVICE=cuda on a GPU
	HF_HUB_OFFLINE=1 $(PYTHON) benchmarks/bench.py --device $(DEVICE) $(ARGS)

docs: setup ## a page for each public name, in docs/build
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(PYTHON) -m sphinx -W -q docs/api docs/build

tensorboard: setup ## open the run's dashboard
	$(VENV)/bin/tensorboard --logdir $(call quote,$(RUN_DIR)/tensorboard)

verify: setup ## check every file of RUN_DIR against the digests on record
	$(PYTHON) -m invdiff_pl verify $(call quote,$(RUN_DIR))

replay: setup ## make the results of RUN_DIR anew in another folder, and compare
	$(PYTHON) -m invdiff_pl replay $(call quote,$(RUN_DIR))

test: setup ## the tests, without the slow ones, on all cores
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -n auto --dist worksteal

test-slow: setup ## the tests that train for minutes
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -m slow

soak: setup ## kills, full disks and damaged input in large numbers (half an hour)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m soak -p no:xdist

lint: setup ## ruff: style and formatting
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: setup ## let ruff format the code
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

type: setup ## mypy
	$(PYTHON) -m mypy

clean: ## remove runs and caches, not the environment
	rm -rf runs .cache .mypy_cache .ruff_cache .pytest_cache
