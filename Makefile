# On a fresh machine: `make demo` or `make test`. Every target sets up its own virtual environment.

SHELL := /bin/bash
# Each line of a recipe is a shell of its own: GNU make 3.81, which macOS has, knows neither .SHELLFLAGS nor .ONESHELL.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
STAND_IN := warm-cache-stand-in:real
TINY := warm-cache-stand-in:tiny
# Runs a command against the engine that answers, else against a private one that it stops again.
ENGINE := docker/stand-in/engine/engine.sh run .demo/engine
ARGS ?=
# Tests start the program some thousand times: with bytecode in half the time.
unexport PYTHONDONTWRITEBYTECODE
# As many tests at a time. Half of a test's time is spent waiting for containers.
WORKERS ?= 2
UPSTREAM ?=
BUILDER_IMAGE ?= warm-cache:latest
BUILDER_BASE ?= python:3.12-slim
PIP_OPTIONS ?=

.PHONY: help
help: ## Show this help
	@sed -n 's/^\([a-z-]*\):.* ## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

.PHONY: venv
venv: $(VENV)/.ready ## Set up the virtual environment in .venv

$(VENV)/.ready: pyproject.toml
	@python=; \
	for candidate in $${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	[ -n "$$python" ] || { echo "error: no Python 3.10 or later found; install one, or set PYTHON" >&2; exit 1; }; \
	echo "setting up $(VENV) with $$python" >&2; \
	"$$python" -m venv --clear $(VENV) || { echo "error: $$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

.PHONY: demo
demo: $(VENV)/.ready ## Warm the stand-in profile: real compilers, no GPU (run it twice: cold, then warm)
	@$(ENGINE) $(MAKE) --no-print-directory demo-here

.PHONY: demo-here
demo-here: $(VENV)/.ready
	@docker/stand-in/real/build.sh $(STAND_IN)
	@mkdir -p .demo/cache
	@$(BIN)/warm-cache warm --profile stand-in --image $(STAND_IN) --cache .demo/cache --log-dir .demo/logs $(ARGS)
	@printf '\nNext: make demo    again, to see a warm run\n      make shell   to try the other commands on this cache (status, explain, env, ...)\n'

.PHONY: shell
shell: $(VENV)/.ready ## Open a shell with an engine, the program and the demo's cache (ARGS='-c "warm-cache status"')
	@$(ENGINE) docker/stand-in/shell.sh $(ARGS)

.PHONY: warm-cache
warm-cache: $(VENV)/.ready ## Warm the h200 profile on this machine's GPUs (ARGS="--cache DIR --image REF …")
	@$(BIN)/warm-cache warm --profile h200 --create $(ARGS)

.PHONY: test
test: lint ## Run lint, types and all tests, with whatever images they need
	@$(ENGINE) $(MAKE) --no-print-directory test-here

.PHONY: test-here
test-here: $(VENV)/.ready
	@docker/stand-in/tiny/make-image.sh $(TINY)
	@docker/stand-in/real/build.sh $(STAND_IN)
	@WARM_CACHE_TEST_IMAGE=$(TINY) WARM_CACHE_STAND_IN=$(STAND_IN) WARM_CACHE_TESTS_COMPLETE=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: unit
unit: $(VENV)/.ready ## Run the unit tests: no engine, no process, below a minute
	@$(BIN)/pytest -n $(WORKERS) tests/unit $(ARGS)

.PHONY: lint
lint: $(VENV)/.ready ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/mypy

.PHONY: faults
faults: $(VENV)/.ready ## Run the tests of faults and write their table, tests/engine/README.md
	@$(ENGINE) $(MAKE) --no-print-directory faults-here

.PHONY: faults-here
faults-here: $(VENV)/.ready
	@docker/stand-in/tiny/make-image.sh $(TINY)
	@WARM_CACHE_TEST_IMAGE=$(TINY) WARM_CACHE_FAULT_TABLE=1 $(BIN)/pytest -m "fault and not bench" tests/engine $(ARGS)

.PHONY: bench
bench: $(VENV)/.ready ## Measure (tests/bench/README.md has the numbers)
	@$(ENGINE) $(MAKE) --no-print-directory bench-here

.PHONY: bench-here
bench-here: $(VENV)/.ready
	@docker/stand-in/tiny/make-image.sh $(TINY)
	@docker/stand-in/real/build.sh $(STAND_IN)
	@WARM_CACHE_TEST_IMAGE=$(TINY) WARM_CACHE_STAND_IN=$(STAND_IN) WARM_CACHE_TESTS_COMPLETE=1 $(BIN)/pytest -m bench -s tests/bench $(ARGS)

.PHONY: profiles
profiles: $(VENV)/.ready ## Make the packaged profiles again from a checkout of sglang (UPSTREAM=DIR)
	@[ -d "$(UPSTREAM)/test/registered" ] || { echo "error: UPSTREAM=DIR names no checkout of sglang" >&2; exit 2; }
	@$(BIN)/python -m tests.profiles "$(UPSTREAM)"

.PHONY: dist
dist: $(VENV)/.ready ## Build the wheel and the source distribution into dist/
	@rm -rf dist
	@$(BIN)/hatchling build -d dist

.PHONY: builder-image
builder-image: $(VENV)/.ready ## Build the image that pods restore and push with (BUILDER_IMAGE=…, BUILDER_BASE=…, PIP_OPTIONS=…)
	@rm -f dist/warm_cache-*.whl
	$(BIN)/hatchling build -d dist -t wheel
	docker build -f docker/Dockerfile --target builder -t $(BUILDER_IMAGE) \
	  --build-arg BUILDER_BASE=$(BUILDER_BASE) --build-arg PIP_OPTIONS="$(PIP_OPTIONS)" .

# Everything but builder/ comes from the checkout; builder/ is what the wheel installed, also for child processes.
.PHONY: test-wheel
test-wheel: ## Install the wheel in dist/ into a fresh virtual environment and run the unit tests on it
	@rm -rf .wheel
	@mkdir -p .wheel/tree .wheel/cache
	@"$${PYTHON:-python3}" -m venv .wheel/venv
	@wheel=$$(echo dist/*.whl); .wheel/venv/bin/pip install --quiet --disable-pip-version-check "$$wheel[dev]"
	@set -o pipefail; git ls-files -z | grep -zv '^builder/' | tar -c --null -T - | tar -x -C .wheel/tree
	@ln -s "$$(cd / && "$(CURDIR)/.wheel/venv/bin/python" -c 'import builder; print(builder.__path__[0])')" .wheel/tree/builder
	@export PATH="$(CURDIR)/.wheel/venv/bin:$$PATH"; \
	cd .wheel/tree && warm-cache --version && warm-cache --help >/dev/null || exit; \
	status=0; \
	warm-cache check --here --profile stand-in --cache ../cache || status=$$?; \
	[ "$$status" = 10 ] || { echo "error: a check of an empty cache ended with $$status instead of 10" >&2; exit 1; }; \
	pytest tests/unit $(ARGS)

.PHONY: clean
clean: ## Stop the private engine; remove everything that make made here
	@[ ! -d .demo/engine ] || docker/stand-in/engine/engine.sh down .demo/engine
	@rm -rf .demo/logs .demo/cache 2>/dev/null || docker run --rm --network none -v "$(CURDIR)/.demo:/demo" $(STAND_IN) \
	  rm -rf /demo/cache # containers wrote it as root
	@rm -rf .demo .wheel $(VENV) dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find builder tests docker -name __pycache__ -prune -exec rm -rf {} +
