# `make help` lists the targets. `make test` and `make demo` work on a fresh clone: they set up .venv first.
# test-gpu and bench-gpu take ARGS (as ARGS=--quick), and copy what they find to the folder OUT where that is set.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.moec-test
DEV    := $(VENV)/.moec-dev

# A process a core, each with whole files: what a file's tests share is made once.
SHARED := -n auto --dist loadfile

# `make test-full` runs the suite a second time with this Triton, in a virtual environment of its own.
NEXT        := .venv-triton-next
NEXT_TRITON := 3.9.0

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-gpu bench bench-gpu lint format clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP)  ## build and run a small trained MoE model on the CPU
	$(PY) examples/pydoc/demo.py

test: $(STAMP)  ## the tests, on the CPU
	$(PY) -m pytest $(SHARED)

test-full: $(STAMP) $(NEXT)/.moec-test  ## every test, with more examples, then again with a newer Triton
	HYPOTHESIS_PROFILE=full $(PY) -m pytest --full $(SHARED)
	$(NEXT)/bin/python -m pytest --full $(SHARED)

test-gpu: check-gpu-python  ## the GPU tests, with the python3 on PATH and what it has installed
	@$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("error: PyTorch finds no NVIDIA GPU here")'
	PYTHONPATH=. $(PYTHON) -m pytest tests/gpu -rs $(if $(OUT),--junitxml='$(OUT)/test-gpu.xml') $(ARGS)

bench: $(STAMP)  ## benchmark whole models on the CPU
	$(PY) benchmarks/cpu_model.py

bench-gpu: check-gpu-python  ## benchmark MoE layers on the GPU, with the python3 on PATH
	PYTHONPATH=. $(PYTHON) benchmarks/moe_layer.py $(ARGS)

lint: $(DEV)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(DEV)  ## format, and repair what ruff can repair
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:  ## remove build outputs and caches
	rm -rf build dist *.egg-info .hypothesis .moec-cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove the virtual environments
	rm -rf $(VENV) $(NEXT)

# Set up -----------------------------------------------------------------------------------------------------------

.PHONY: check-python check-gpu-python
check-python:
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) on PATH; moec needs Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("error: moec needs Python 3.11 or newer; $(PYTHON) is %d.%d (name another: make PYTHON=python3.12 ...)" % v[:2])'
	@test -d moec/ir/ || { echo "error: moec/ir is not a link to ../ir; clone again with git -c core.symlinks=true" >&2; exit 1; }

check-gpu-python: check-python
	@$(PYTHON) -c 'import importlib.util as u, sys; need = ["torch", "triton", "networkx", "jinja2", "safetensors", "numpy", "pytest"]; missing = [m for m in need if u.find_spec(m) is None]; missing and sys.exit("error: $(PYTHON) (%s) lacks %s" % (sys.executable, ", ".join(missing)))'

# $(call new-venv,DIR): make it unless a working one of Python 3.11 or newer is there.
define new-venv
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
@$(1)/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear $(1)
endef

# $(call install,DIR,EXTRAS,CONSTRAINTS). PyPI's torch for Linux is the CUDA build, which pins a Triton and an NVRTC of
# its own; when the tried set cannot be resolved, take those that torch brings. editable_mode=compat puts the clone on
# sys.path, where Python finds `import moec` even beside the clone, whose folder has that name too.
define install
@echo "installing moec[$(2)] into $(1) (about a minute)"
@p="$(1)/bin/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat"; \
$$p -c $(3) -e '.[$(2)]' 2>$(1)/install.log || { \
  grep -q 'ResolutionImpossible\|conflicting dependencies' $(1)/install.log || { cat $(1)/install.log >&2; exit 1; }; \
  echo "note: pip offers a torch that brings its own Triton and NVRTC; taking those instead of the tried ones"; \
  grep -v '^triton=\|^nvidia-' $(3) >$(1)/constraints.txt; \
  $$p -c $(1)/constraints.txt -e '.[$(2)]'; }
endef

$(STAMP): pyproject.toml constraints.txt | check-python
	$(call new-venv,$(VENV))
	$(call install,$(VENV),test,constraints.txt)
	@touch $@

$(DEV): $(STAMP)
	$(call install,$(VENV),test$(comma)dev,constraints.txt)
	@touch $@

$(NEXT)/.moec-test: pyproject.toml constraints.txt | check-python
	$(call new-venv,$(NEXT))
	@sed 's/^triton==.*/triton==$(NEXT_TRITON)/' constraints.txt >$(NEXT)/constraints-next.txt
	$(call install,$(NEXT),test,$(NEXT)/constraints-next.txt)
	@touch $@

comma := ,
