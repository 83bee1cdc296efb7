# On a fresh Debian or Ubuntu with Python 3.11 or newer, its venv module and make:
#   make report   the demonstration on the embedded data, ending in out/demo/index.html
#   make test     everything that is checked: style, types, notebooks, package
# Both make .venv first, when it is missing or when one of the files that say what belongs in it has changed.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
# Named after what the files hold, not after their time: nbdev-export writes pyproject.toml anew each time.
WANTED := constraints.txt settings.ini setup.py pyproject.toml
STAMP := $(VENV)/.installed-$(shell cat $(WANTED) | sha256sum | cut -c1-16)
OUT ?= out/demo
OLDEST_PYTHON := $(shell sed -n 's/^min_python *= *//p' settings.ini)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < tuple(map(int, "$(OLDEST_PYTHON)".split("."))))
# The first of these that is new enough; name another one with `make report PYTHON=/path/to/python`.
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11 python3.14; do \
  if "$$p" -c '$(NEW_ENOUGH)' 2>/dev/null; then echo "$$p"; break; fi; done)
# Notebooks, and files of tests, that run at once, one thread each. Left out: report templates, which the package runs with parameters, and benchmarks.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
SKIP_FOLDERS := ^([_.].*|notebooks|benchmarks)$$

.PHONY: help report test lint types notebooks pytest browser azurite lab constraints clean

help: ## this list
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

report: $(STAMP) ## the demonstration on the embedded data: out/demo/index.html
	@$(BIN)/visrec demo --out $(OUT)

test: lint types notebooks pytest ## all checks

lint: $(STAMP) ## style: ruff
	@$(BIN)/ruff check .

types: $(STAMP) ## types: mypy
	@$(BIN)/mypy

notebooks: $(STAMP) ## every notebook from top to bottom
	@OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers $(JOBS) --timing --skip-folder-re '$(SKIP_FOLDERS)'

pytest: $(STAMP) browser azurite ## package and project tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# Chromium for the browser tests. Where it cannot be had, those tests are skipped and say so; under CI they fail.
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	  if command -v "$$name" >/dev/null; then exit 0; fi; \
	done; \
	if ! command -v apt-get >/dev/null; then sudo=none; \
	elif [ "$$(id -u)" -eq 0 ]; then sudo=; \
	elif sudo -n true 2>/dev/null; then sudo="sudo -n"; \
	else sudo=none; fi; \
	if [ "$$sudo" = none ]; then \
	  echo "note: no Chromium, and no right to install one: the browser tests will not run (apt-get install chromium)"; \
	else \
	  echo "Installing Chromium for the browser tests"; \
	  { $$sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	  || echo "note: apt-get could not install Chromium: the browser tests will not run"; \
	fi

# An emulator of Azure's blob store for a test, inside .venv; from npm, which Debian has. Without it that test is skipped and says so; under CI it fails.
AZURITE := 3.37.0
azurite: $(STAMP)
	@if [ -x $(VENV)/azurite/node_modules/.bin/azurite-blob ]; then exit 0; fi; \
	if ! command -v npm >/dev/null && command -v apt-get >/dev/null && { [ "$$(id -u)" -eq 0 ] || sudo -n true 2>/dev/null; }; then \
	  sudo=; [ "$$(id -u)" -eq 0 ] || sudo="sudo -n"; \
	  { $$sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -qq --no-install-recommends npm >/dev/null; } || true; \
	fi; \
	if ! command -v npm >/dev/null; then echo "note: no npm: the test with Azure's store will not run (apt-get install npm)"; exit 0; fi; \
	echo "Installing azurite for a test"; \
	npm install --prefix $(VENV)/azurite --no-audit --no-fund --no-progress --loglevel=error azurite@$(AZURITE) >/dev/null \
	|| { rm -rf $(VENV)/azurite; echo "note: npm could not install azurite: the test with Azure's store will not run"; }

lab: $(STAMP) ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab nbs

constraints: ## constraints.txt anew after a change of settings.ini, for all Pythons; pins that still fit stay
	@tools=$$(mktemp -d); trap 'rm -rf "$$tools"' EXIT; \
	"$(PYTHON)" -m venv "$$tools"; "$$tools/bin/pip" install -q uv; \
	"$$tools/bin/uv" pip compile -q pyproject.toml --extra all --universal --python-version $(OLDEST_PYTHON) --no-annotate \
	  --custom-compile-command 'make constraints' -o constraints.txt

clean: ## remove what was made, but not .venv
	rm -rf out build dist _proc *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(STAMP):
	@if ! $(BIN)/python -c 'import pip; $(NEW_ENOUGH)' 2>/dev/null; then \
	  if ! "$(PYTHON)" -c '$(NEW_ENOUGH)' 2>/dev/null; then \
	    echo "$(if $(PYTHON),$(PYTHON) is not,The PATH has no) Python $(OLDEST_PYTHON) or newer. Install one" \
	      "(Debian 12, Ubuntu 24.04: apt-get install python3 python3-venv), or name it:" \
	      "make $(or $(MAKECMDGOALS),report) PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$("$(PYTHON)" --version)"; \
	  "$(PYTHON)" -m venv --clear $(VENV); \
	fi
	@echo "Installing visrec_nb and what it needs into $(VENV) (some 6 GB, most of it torch: minutes, once)"
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[all]'
	@rm -f $(VENV)/.installed*
	@touch $@
