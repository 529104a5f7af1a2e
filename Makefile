# SPDX-License-Identifier: Apache-2.0
# `make help` lists the targets. Debian 12 as root or with sudo; nothing is installed beforehand but make.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# Passed on to pytest by `make test` and `make test-full`.
PYTEST_ARGS ?=
# Passed on by `make docker-test`: --keep makes the next run faster.
DOCKER_TEST_ARGS ?=
export PATH := $(CURDIR)/$(BIN):$(PATH)

# What building, testing and the lab need of Debian.
PACKAGES := binutils busybox-static gcc ibverbs-providers iproute2 kmod libc6-dev libibverbs-dev \
	librdmacm-dev pkg-config python3-dev python3-pyverbs python3-venv qemu-system-x86 rdma-core
# An sdist is what git knows of the sources.
test test-full build: PACKAGES += git

export CMD

# On a host with an RDMA device of its own, name it in RDMA_MIG_DEVICE: no lab is booted then.
LAB := $(if $(RDMA_MIG_DEVICE),,tests/lab/run)

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | \
		while IFS=$$'\t' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

.PHONY: demo
demo: setup ## migrate a running QEMU guest onto disk and back, over RDMA
	$(if $(LAB),$(LAB) --timeout 600 --) $(CURDIR)/$(BIN)/python demo/run

.PHONY: try
try: setup ## the quickest first try: a guest of a real QEMU onto disk and back, without RDMA
	$(BIN)/python demo/try

.PHONY: test
test: setup ## the tests of every run, some 15 minutes emulated; PYTEST_ARGS="-k name" selects
	$(BIN)/python tests/lab/suite.py $(PYTEST_ARGS)

.PHONY: test-full
test-full: setup ## all tests, the larger and slower cells too
	$(BIN)/python tests/lab/suite.py --full --limit 10800 $(PYTEST_ARGS)

N ?= 1000
SEED ?=
.PHONY: soak
soak: setup ## migrations that fail at random steps, and what they leave: make soak N=1000
	$(if $(LAB),$(LAB) --timeout 86400 --) $(CURDIR)/$(BIN)/python tests/rdma/rdma_soak.py --runs $(N) $(if $(SEED),--seed $(SEED))

SECONDS_EACH ?= $(or $(SECONDS),60)
# Connections of the fuzzer over the device that are part of `make fuzz`.
FUZZ_CONNECTIONS ?= 200
.PHONY: fuzz
fuzz: PACKAGES += clang libclang-rt-14-dev
fuzz: setup ## fuzz decoders, Cython code and both ends: make fuzz SECONDS=600 (for each decoder)
	$(BIN)/pip install -q $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open( \
		"pyproject.toml", "rb"))["project"]["optional-dependencies"]["fuzz"])')
	$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS_EACH)
	$(BIN)/python tests/fuzz/sanitize.py --seconds 20 --prove
	$(BIN)/python tests/fuzz/sanitize.py --seconds $(SECONDS_EACH)
	$(if $(LAB),$(LAB) --timeout 3600 --) $(CURDIR)/$(BIN)/python tests/rdma/rdma_fuzz.py --runs $(FUZZ_CONNECTIONS) $(if $(SEED),--seed $(SEED))

.PHONY: fuzz-live
fuzz-live: setup ## connections with a peer that changes what it says: make fuzz-live N=10000
	$(if $(LAB),$(LAB) --timeout 86400 --) $(CURDIR)/$(BIN)/python tests/rdma/rdma_fuzz.py --runs $(N) $(if $(SEED),--seed $(SEED))

# Such as BENCH_ARGS="--ram 256M --content random --rounds 3".
BENCH_ARGS ?=
# A guest of 2 GiB at both ends, two snapshots of it, and our own two copies.
BENCH_LAB := $(or $(RDMA_MIG_LAB),$(if $(LAB),$(LAB) --memory 14G --timeout 86400 --share test-logs --))
.PHONY: bench
bench: setup ## time migrations between QEMU and rdma-migrate, and the floor: BENCH_ARGS=...
	@mkdir -p test-logs
	$(BENCH_LAB) env RDMA_MIG_DEVICE=$(or $(RDMA_MIG_DEVICE),rxe0) \
		$(CURDIR)/$(BIN)/python tests/bench/run.py $(BENCH_ARGS)

# Needs Python, and Docker's own: not `setup`, since hosts with Docker need not be Debian.
.PHONY: docker-test
docker-test: ## build the container images and run all of docs/docker.md with a real Docker engine
	python3 tests/docker/run $(DOCKER_TEST_ARGS)

.PHONY: lab
lab: setup ## a shell in a machine with an RDMA device (soft-RoCE)
	tests/lab/run --timeout 86400 --shell

.PHONY: lab-run
lab-run: setup ## run a command in such a machine: make lab-run CMD="ibv_devinfo"
	@[ -n "$$CMD" ] || { echo 'make lab-run: name the command: CMD="ibv_devinfo"' >&2; exit 2; }
	tests/lab/run -- bash -c "$$CMD"

.PHONY: lint
lint: $(VENV)/.lint ## ruff, mypy, cython-lint, shellcheck, the man page
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/cython-lint cext
	$(BIN)/shellcheck docker/setup-rxe
	$(BIN)/python man/generate --check

.PHONY: format
format: $(VENV)/.lint ## format the Python sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: man
man: $(VENV)/.lint ## write the man page anew, from what the commands say of themselves
	$(BIN)/python man/generate

.PHONY: build
build: setup ## sdist and wheel, into dist/
	$(BIN)/pip wheel --no-deps --no-build-isolation --wheel-dir dist .
	$(BIN)/python -c 'import mesonpy; print(mesonpy.build_sdist("dist"))'

.PHONY: setup
setup: $(VENV)/.setup ## install what is missing, build, create .venv with an editable install

.PHONY: install-deps
install-deps: ## install the Debian packages that are missing
	@missing=$$(for package in $(PACKAGES); do \
		dpkg-query -W -f='$${db:Status-Status}' $$package 2>/dev/null | grep -qx installed || \
			echo $$package; \
	done); \
	[ -z "$$missing" ] && exit 0; \
	command -v apt-get >/dev/null || { echo "make: no apt-get here; install:" $$missing >&2; exit 1; }; \
	echo "installing:" $$missing; \
	apt_install() { $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -qq -y \
		--no-install-recommends -o Dpkg::Use-Pty=0 install $$missing; }; \
	{ compgen -G '/var/lib/apt/lists/*Packages*' >/dev/null && apt_install; } || \
		{ $(SUDO) apt-get -q update && apt_install; }

# The distribution's python3-pyverbs belongs to /usr/bin/python3, and is seen from a venv with
# system packages. Without build isolation an editable install can rebuild itself on import.
$(VENV)/.setup: pyproject.toml meson.build meson.options cext/meson.build | install-deps
	/usr/bin/python3 -m venv --system-site-packages $(VENV)
	$(BIN)/pip install -q $$($(BIN)/python -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])')
	CYTHON=$(CURDIR)/$(BIN)/cython $(BIN)/pip install -q --no-build-isolation \
		--config-settings=setup-args=-Dverbs=enabled -e '.[test]'
	@touch $@

$(VENV)/.lint: $(VENV)/.setup
	$(BIN)/pip install -q $$($(BIN)/python -c 'import tomllib; \
		extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
		print(*(x for x in extras["dev"] if not x.startswith("rdma-mig")))')
	@touch $@

.PHONY: clean
clean: ## remove what the other targets have made
	rm -rf .lab $(VENV) build dist test-logs .pytest_cache .mypy_cache .ruff_cache .hypothesis
