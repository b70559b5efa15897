# SPDX-License-Identifier: Apache-2.0
# Every target makes its own environment; a fresh machine needs python3 and make.
#
#   make demo            the project alone in .venv: 1.1 GB
#   make test            adds libtpu (0.7 GB), pytest, Jupyter's kernel ...: 2.1 GB in all
#   make test ORACLES=1  adds torch, transformers, TensorFlow and lm_eval, to compare with: 8.5 GB in all, or 4.7 GB with
#                        torch for the CPU alone, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
#   ... LOCKED=1         installs the versions of launch/constraints.txt, with which the whole suite passes

PYTHON ?= python3
VENV ?= .venv
ORACLES ?=
LOCKED ?=

PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check $(if $(LOCKED),--constraint launch/constraints.txt)
CORE = $(VENV)/ready-core
TEST = $(VENV)/ready-test
ALL = $(VENV)/ready-oracles
BENCH = $(VENV)/ready-bench

WORKERS = -n 2 --dist loadfile  # most of the time is XLA compiling, on one core
HANGS = -o faulthandler_timeout=400  # a test that takes longer says where it is

.PHONY: demo test lint lock bench colab-check docs clean

demo: $(CORE)  ## text to samples in minutes, on the CPU
	$(VENV)/bin/python experiments/demo.py

test: $(if $(ORACLES),$(ALL),$(TEST))  ## the whole suite; with ORACLES=1, none of it may skip for want of a package
	$(VENV)/bin/python -m pytest -q $(WORKERS) $(HANGS) $(if $(ORACLES),--oracles) $(PYTEST_ARGS) tests

lint: $(TEST)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck launch/*.sh .ci/run

lock:  ## launch/constraints.txt anew: the newest versions, for this Python (3.13); then the suite has to pass with them
	$(PYTHON) -m venv --clear $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --editable '.[tpu,eval,harness,console,wandb,docs,webtext,privacy,test,oracles]'
	grep '^#' launch/constraints.txt > $(VENV)-lock/constraints.txt
	$(VENV)-lock/bin/python -m pip freeze --exclude-editable \
	  | grep --invert-match '^nvidia-\|^cuda-\|^triton=' >> $(VENV)-lock/constraints.txt
	mv $(VENV)-lock/constraints.txt launch/constraints.txt

bench: $(BENCH)  ## this project against torch, alternating
	$(VENV)/bin/python experiments/bench.py

colab-check:  ## installs on top of Google Colab's packages (Python 3.13): they stay, the notebooks run
	$(PYTHON) experiments/colab/check.py $(COLAB_ARGS)

docs: $(CORE)  ## the public API as web pages: runs/docs/index.html
	$(PIP) --editable '.[docs]'
	JAX_PLATFORMS=cpu $(VENV)/bin/pdoc --docformat markdown --output-directory runs/docs gpt2_jax

clean:
	rm -rf $(VENV) $(VENV)-lock runs/demo runs/docs

$(CORE): setup.py launch/constraints.txt
	@echo "$(VENV): installing the project with JAX; a minute or two, 1.1 GB"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(TEST): $(CORE)
	@echo "$(VENV): installing what the tests need; a minute or two, 1 GB more"
	$(PIP) --editable '.[test]'
	touch $@

$(ALL): $(TEST)
	@echo "$(VENV): installing torch, transformers, TensorFlow and lm_eval; minutes, 3 to 6 GB more"
	$(PIP) --editable '.[test,oracles]'
	touch $@

$(BENCH): $(CORE)
	@echo "$(VENV): installing torch and lm_eval; minutes, 1 to 5 GB more"
	$(PIP) --editable '.[bench]'
	touch $@
