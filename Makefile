# make demo · make test · make test-quick · make docs · make bench
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
# The first of these that exists and is new enough; override with `make demo PYTHON=/path/to/python`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& { command -v $$p; break; }; done)

COMMA := ,
# Every script that can be run, but for those that architectures.py runs itself.
BENCHMARKS = $(filter-out benchmarks/measure_%,$(shell grep -l '^if __name__ == "__main__":' benchmarks/*.py))

.PHONY: help demo test test-quick test-slow check docs bench fuzz audit sbom clean

help:
	@echo "make demo        set up .venv, then train the three models of the demo (about 6 minutes on two cores)"
	@echo "make test        set up .venv, then lint, types, contracts and the whole suite"
	@echo "make test-quick  the same without the tests marked slow"
	@echo "make docs        build the documentation into site/"
	@echo "make fuzz        mutated input for every reader, ten minutes"
	@echo "make audit       look the dependencies up among known vulnerabilities (needs the network)"
	@echo "make sbom        write sbom.json, a CycloneDX bill of what is installed"
	@echo "make bench       run every benchmark, between one and two hours on an idle machine"

# An environment per set of extras: the stamp is newer than what it was made from, or it is made again.
define install
	@if [ -z "$(PYTHON)" ]; then
		echo "toolmem needs Python 3.11, 3.12 or 3.13, and none is on the PATH. Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2
		exit 2
	fi
	if ! "$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
		echo "toolmem needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$("$(PYTHON)" -V 2>&1). Name another: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2
		exit 2
	fi
	if ! "$(PYTHON)" -c 'import ensurepip' 2>/dev/null; then
		echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian, Ubuntu: apt-get install python3-venv)" >&2
		exit 2
	fi
	[ -x "$(BIN)/python" ] || "$(PYTHON)" -m venv "$(VENV)"
	echo "installing toolmem$(1) into $(VENV) (a few minutes the first time)"
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".$(1)"
	touch "$@"
endef

$(VENV)/.base: pyproject.toml constraints.txt
	$(call install,)

$(VENV)/.dev: pyproject.toml constraints.txt
	$(call install,[dev$(COMMA)docs])
	touch "$(VENV)/.base"

demo: $(VENV)/.base
	"$(BIN)/toolmem" demo

check: $(VENV)/.dev
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"
	"$(BIN)/lint-imports"

test-quick: check
	"$(BIN)/pytest" -n 2 -m "not slow" --durations 15

test-slow: $(VENV)/.dev
	"$(BIN)/pytest" -n 2 -m slow --durations 15 --timeout 1500

test: check
	echo "quick tests"
	"$(BIN)/pytest" -n 2 -m "not slow" --durations 15
	echo "slow tests"
	"$(BIN)/pytest" -n 2 -m slow --durations 15 --timeout 1500

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 "$(BIN)/mkdocs" build --strict

bench: $(VENV)/.dev
	for script in $(BENCHMARKS); do echo "$$script"; "$(BIN)/python" "$$script"; done

fuzz: $(VENV)/.dev
	"$(BIN)/python" tests/fuzz/fuzzing.py --seconds 600

# Each pinned version looked up in the PyPA's database of vulnerabilities; this needs the network.
audit: $(VENV)/.base
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check "pip-audit>=2.7"
	"$(BIN)/pip-audit" --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

sbom: $(VENV)/.base
	"$(BIN)/python" .ci/sbom.py --output sbom.json

clean:
	rm -rf "$(VENV)" site .pytest_cache .mypy_cache .ruff_cache
