# Everything is set up in .venv: fp8ctl itself, the engine it manages and the demo model.
# Needs Python 3.11 or 3.12, pip, gcc and a package registry.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.11 python3.12; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
	&& echo $$p && break; done)

# One home for `make demo` and `make test`, so that neither installs what the other has.
export FP8CTL_HOME ?= $(CURDIR)/$(VENV)/var/fp8ctl
export FP8CTL_TEST_HOME ?= $(FP8CTL_HOME)
export FP8CTL_TEST_CACHE ?= $(CURDIR)/$(VENV)/var/test-cache

# Named after what pip was told, so that a file which is only touched (git checkout, a
# copy) installs nothing anew: that may need a network.
STAMP := $(shell cat pyproject.toml constraints.txt | cksum | tr ' ' -)
BASE := $(VENV)/.base-$(STAMP)
DEV := $(VENV)/.dev-$(STAMP)

.PHONY: demo test test-all lint mutate conformance clean

demo: $(BASE)
	$(BIN)/fp8ctl demo

test: $(DEV) lint
	$(BIN)/python -m pytest -m "not long and not gpu"

test-all: $(DEV) lint
	$(BIN)/python -m pytest

# Hours; `python tools/mutate.py store` is one module.
mutate: $(DEV)
	$(BIN)/python tools/mutate.py diff plan store fsops transaction

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BASE):
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 on PATH" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@rm -f $(VENV)/.base* && touch $@

# torch comes first and alone: a CPU build from the user's own find-links or index
# then satisfies the range in pyproject.toml, and nothing asks for another.
# Its version stands in constraints.txt alone.
$(DEV): $(BASE)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[torch,dev]'
	@rm -f $(VENV)/.dev* && touch $@

# What docs/conformance.md compares with, in an environment of its own; torch comes first here too.
CONF := $(VENV)/var/conformance
TORCH := $(shell grep '^torch==' constraints.txt)
CONF_MADE := $(CONF)/.made-$(shell cat tools/conformance/requirements.txt \
	tools/conformance/packages.py constraints.txt 2>/dev/null | cksum | tr ' ' -)

conformance: $(DEV) $(CONF_MADE)
	$(BIN)/python -m tools.conformance --out docs/conformance.md \
		--python $(CONF)/bin/python --wheels $(CONF)/wheels --require

$(CONF_MADE): $(DEV)
	$(PYTHON) -m venv $(CONF)
	$(CONF)/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(CONF)/bin/python -m pip install -q --disable-pip-version-check $(TORCH) \
		-r tools/conformance/requirements.txt
	$(BIN)/python -m tools.conformance --wanted | while read -r wheel; do \
		$(CONF)/bin/python -m pip download -q --disable-pip-version-check --no-deps \
		--only-binary :all: -d $(CONF)/wheels "$$wheel" || exit 1; done
	@rm -f $(CONF)/.made* && touch $@

clean:
	rm -rf $(VENV)
