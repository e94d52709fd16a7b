# Everything is built into .venv/; nothing is needed beforehand but python3 (3.11 or newer), a C compiler and make.

PYTHON ?= python3
BIN := .venv/bin
# What is compiled once need not be compiled by every process of a test.
unexport PYTHONDONTWRITEBYTECODE
CORE := src/fastdist/_core.pyx $(wildcard src/fastdist/core/*)
# How the core was built last: a build of another kind, debug and sanitize too, begins by removing this.
BUILT := .venv/.built-$(or $(FASTDIST_BUILD),release)
DEPENDENCIES := import tomllib; of = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*of['dependencies'], *sum(of['optional-dependencies'].values(), []))
PYTEST := $(BIN)/python -m pytest --durations=25
# Processes of tests: one for each core, or two where tests mostly wait.
CORES = --numprocesses=$(shell nproc) --dist=worksteal
TWICE = --numprocesses=$$((2 * $(shell nproc))) --dist=loadgroup
QUICK_TESTS = $(PYTEST) $(CORES) tests/unit tests/component
SYSTEM_TESTS = $(PYTEST) $(TWICE) tests/e2e tests/deploy tests/browser tests/chaos tests/cluster
FUZZ_SECONDS ?= 120

.PHONY: help build run run-cluster check system test unit component e2e browser deploy explore bare screenshots chaos cluster docs bench bench-quick load micro profile generated lint types debug sanitize fuzz wheel clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

build:  ## build everything into .venv/
	@$(MAKE) --no-print-directory --jobs=2 --quiet .venv/.tools $(BUILT)

.venv/.made:
	$(PYTHON) -c 'import sys; sys.exit("python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --group build
	touch $@

# Not compiled: most of these modules are never imported, and the others are compiled when they are.
.venv/.tools: .venv/.made pyproject.toml
	$(BIN)/python -m pip install --quiet --no-compile --group dev $$($(BIN)/python -c "$(DEPENDENCIES)")
	touch $@

# Without what fastdist needs at run time: that is installed with the tools, while the core is compiled.
# Without the C file Cython and the compiler begin again, whatever kind it was of.
$(BUILT): .venv/.made setup.py pyproject.toml $(CORE)
	rm -f .venv/.built* src/fastdist/_core.c
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

run: build  ## four mock analyzers (3001-3004) and the distributor (3000); Ctrl-C ends all
	@setsid $(BIN)/python -m mock_analyzers --quiet & mocks=$$!; \
	trap 'kill $$mocks 2>/dev/null; wait $$mocks' EXIT; trap : INT TERM; \
	$(BIN)/fastdist serve

run-cluster: build  ## three NATS servers, two replicas, a balancer if there is HAProxy or nginx (3000), mock analyzers; Ctrl-C ends all
	@exec $(BIN)/python scripts/run_cluster.py $(ARGS)

check: build  ## what is quick to tell: lint, types, unit and component tests, on all cores
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types & types=$$!; \
	$(QUICK_TESTS); tests=$$?; \
	wait $$types && exit $$tests

system: build  ## all other tests: e2e, deploy, browser, chaos, cluster; most of their time is waiting
	$(SYSTEM_TESTS)

test: build  ## every test, and which took longest
	$(QUICK_TESTS); quick=$$?; $(SYSTEM_TESTS) && exit $$quick

unit component e2e browser deploy cluster: build  ## one kind of tests
	$(BIN)/python -m pytest tests/$@

explore: build  ## look for what no test has thought of: other, and ten times as many examples, another CHAOS_SEED; ARGS="-k ring"
	HYPOTHESIS_PROFILE=explore CHAOS_SEED=$${CHAOS_SEED:-random} \
		$(BIN)/python -m pytest --timeout=0 tests/unit tests/component tests/chaos $(ARGS)

bare: .venv/.made  ## make run and make test on a bare Debian 12 and 13 (needs root and debootstrap); ARGS="bookworm", ARGS="--unit"
	$(BIN)/python scripts/bare.py $(ARGS)

screenshots: build  ## take the pictures of the dashboard and the commands for the docs again
	$(BIN)/python scripts/screenshots.py
	$(BIN)/python scripts/terminal_pictures.py

docs: .venv/.tools  ## build the documentation into build/docs; a warning is an error
	rm -rf build/docs
	$(BIN)/python -m sphinx --builder html --fresh-env --doctree-dir build/doctrees --fail-on-warning --keep-going --quiet docs build/docs

chaos: build  ## the long form of the chaos suite (some 25 minutes), with its table for docs/reliability.md
	FASTDIST_CHAOS=long CHAOS_SEED=$${CHAOS_SEED:-random} $(BIN)/python -m pytest tests/chaos

bench: build  ## the race against nginx, HAProxy, Envoy, Express (scripts/bench-peers.sh installs them); ARGS="--help"
	$(BIN)/python bench/race.py $(ARGS)

bench-quick: build  ## does the race work? a second of everything
	$(BIN)/python bench/race.py --quick $(ARGS)

load: build  ## load it with wrk or ab: its own distributor, or URL=http://host:port; ARGS="--tool ab --help"
	$(BIN)/python bench/load.py $(if $(URL),--url "$(URL)") $(ARGS)

micro: build  ## micro-benchmarks of the core, by pytest-benchmark; ARGS="-k ring"
	$(BIN)/python -m pytest bench/micro $(ARGS)

profile: build  ## where the workers spend their time under load (needs perf); ARGS="DELIVERY__MODE=single"
	$(BIN)/python bench/hotspots.py $(ARGS)

generated: build  ## write what is made from other files: fastdist.example.toml, docs/settings.md, openapi.json
	$(BIN)/python scripts/generate_settings.py
	$(BIN)/python scripts/generate_openapi.py

lint: build  ## style
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: build  ## types, and the stubs of the compiled core against what was compiled
	$(BIN)/mypy
	$(BIN)/python tests/stubs.py

debug:  ## build the core with bounds checks and line tracing
	@$(MAKE) --no-print-directory build FASTDIST_BUILD=debug

sanitize:  ## run the core's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(MAKE) --no-print-directory build FASTDIST_BUILD=sanitize
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=16 PYTHONMALLOC=malloc \
		$(BIN)/python -m pytest tests/unit tests/component -m 'not processes'

fuzz: .venv/.tools  ## fuzz what reads bytes of others, FUZZ_SECONDS (120) for each target; needs clang
	$(BIN)/python fuzz/run.py --seconds $(FUZZ_SECONDS) $(FUZZ_OPTIONS)

wheel: build  ## build the wheel, install it into an empty environment and test it there
	sh tests/wheel.sh

clean:  ## remove everything that was built
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f src/fastdist/_core.c src/fastdist/*.so fuzz/core.c
