# Every target installs what it needs; PYTHON names the interpreter that .venv is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PACKAGES := 'import sysconfig; print(sysconfig.get_path("purelib"))'
# Tests of one file stay in one process, where they share compiled programs.
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile
# Fast tests: about 80 seconds of CPU time with an empty compilation cache. They cover settings, text,
# checkpoints' containers, trees, acceptance, sampling, and the loop by two methods beside vanilla.
FAST := $(addprefix tests/, test_cli.py test_config.py test_jobs.py test_text.py test_vocabulary.py \
    $(addprefix checkpoint/, test_lazy_tensor.py test_safetensors.py test_torch_bin.py) \
    $(addprefix decode/, test_acceptance.py test_checks.py test_prompt_lookup.py test_recycling.py \
        test_sampling.py test_tree.py) \
    evaluate/test_metrics.py evaluate/test_tasks.py models/test_cache.py models/test_medusa.py)

.PHONY: demo check test lint types fast docs release clean

# Answers one prompt with vanilla decoding and with EAGLE, and compares texts and speeds.
demo: $(VENV)/.base
	$(BIN)/python decode/demo.py

# Before every commit: under two minutes on two cores, once the tools are installed.
check: $(VENV)/.test
	$(MAKE) --jobs=3 --output-sync=target lint types fast

# Everything.
test: $(VENV)/.test $(VENV)/.tpu
	$(PYTEST)

lint: $(VENV)/.test
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: $(VENV)/.test
	$(BIN)/pyright

fast: $(VENV)/.test
	$(PYTEST) $(FAST)

# The pages of docs/ as a site in site/; a broken link or an unknown name is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Builds the sdist and the wheel into dist/ and checks what a user gets from each.
release: $(VENV)/.test
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	.ci/check-release dist

clean:
	rm -rf $(VENV) $(VENV)-tpu build dist site *.egg-info .nox .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Separate stamps: the demo needs neither torch nor the test tools.
$(VENV)/.base: pyproject.toml | $(BIN)/python
	@echo "Installing eagle-jax and JAX into $(VENV): about 600 MB, a minute or two."
	$(PIP) install -e .
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "Installing what the tests need into $(VENV) (PyTorch, transformers and the tools):"
	@echo "about 2 GB, some minutes."
	$(PIP) install -e '.[test]'
	@touch $(VENV)/.base $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	@echo "Installing mkdocs into $(VENV)."
	$(PIP) install -e '.[docs]'
	@touch $(VENV)/.base $@

# libtpu compiles for TPUs on any x86 Linux machine, but where there is no TPU it prints errors in
# every program that starts JAX. So it lives in an environment of its own, which sees all of .venv.
$(VENV)/.tpu: $(VENV)/.test
ifeq ($(shell uname -sm),Linux x86_64)
	@echo "Installing libtpu into $(VENV)-tpu, to compile for TPUs: about 700 MB."
	$(BIN)/python -m venv --clear --without-pip $(VENV)-tpu
	echo "import site; site.addsitedir('$$($(BIN)/python -c $(PACKAGES))')" \
	    > "$$($(VENV)-tpu/bin/python -c $(PACKAGES))/base.pth"
	$(VENV)-tpu/bin/python -m pip --disable-pip-version-check install 'jax[tpu]'
endif
	@touch $@
