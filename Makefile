# Everything a person or a CI job does with this repository. `make help` lists the targets.
#
# All output goes below target/; tools that cargo can build are installed to target/tools, never system-wide.
# System packages are listed first; a terminal is asked before they are installed (YES=1: do not ask).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

CARGO ?= cargo
TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
TOOLS := $(TARGET)/tools
CARGO_DENY_VERSION := 0.20.2
CARGO_DENY := $(TOOLS)/bin/cargo-deny-$(CARGO_DENY_VERSION)
CARGO_FUZZ_VERSION := 0.13.2
CARGO_FUZZ := $(TOOLS)/bin/cargo-fuzz-$(CARGO_FUZZ_VERSION)
HTTPWG_VERSION := 0.2.5
HTTPWG := $(TOOLS)/bin/httpwg-$(HTTPWG_VERSION)

# Tests and the demonstration share these; `make demo ARGS='--for 60s'`.
ARGS ?=
YES ?=
export YES

.PHONY: help
help: ## List the targets
	@echo 'Sheer: a service mesh you do not see. Targets:'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: ## Build and run the mesh with its sample application, load and dashboard, until Ctrl-C
	@scripts/packages demo
	@echo 'Building sheer (the first build takes a few minutes) ...'
	@$(CARGO) build --locked --profile quick -p sheer
	@exec $(TARGET)/quick/sheer demo $(ARGS)

.PHONY: build
build: ## Build the release binary, target/release/sheer
	@scripts/packages build
	$(CARGO) build --locked --release -p sheer
	@ls -l $(TARGET)/release/sheer

.PHONY: test
test: packages check unit end-to-end ## What CI runs: check, all tests, the demonstration end to end

.PHONY: packages
packages:
	@scripts/packages test

.PHONY: check
check: fmt clippy doc boundaries guards-in-place deny ## Formatting, lints, documentation, crate boundaries, dependency policy

.PHONY: fmt
fmt: ## Formatting alone
	$(CARGO) fmt --all --check

.PHONY: clippy
clippy: ## Lints alone
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

.PHONY: doc
doc: ## Documentation alone, to target/doc
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --workspace --no-deps

.PHONY: boundaries
boundaries: ## Which crate may depend on what
	@scripts/boundaries

.PHONY: guards-in-place
guards-in-place:
	@scripts/guards --check

.PHONY: deny
deny: $(CARGO_DENY) ## Dependency policy (deny.toml) alone
	@scripts/deny $(CARGO_DENY)

# A debug build of the tool takes under a minute; it runs for a second.
$(CARGO_DENY):
	$(CARGO) install --quiet --debug --locked --force cargo-deny@$(CARGO_DENY_VERSION) --root $(TOOLS) --target-dir $(TOOLS)/build
	@mv $(TOOLS)/bin/cargo-deny $@
	@rm -rf $(TOOLS)/build

.PHONY: unit
unit: ## All tests of all crates
	$(CARGO) test --locked --workspace --no-fail-fast

.PHONY: long
long: ## Tests that mostly wait, for minutes: those that `make test` leaves out
	@scripts/packages test
	$(CARGO) build --locked -p sheer
	$(CARGO) test --locked --workspace --no-fail-fast -- --ignored

# `make test` plays 1,000 seeds, and 2,000 orders of threads.
SEEDS ?= 100000
SEED ?=

.PHONY: simulate
simulate: ## Play 100,000 seeds of the simulation and orders of threads (SEEDS=N), or one seed again (SEED=N)
	SEED=$(SEED) SEEDS=$(SEEDS) $(CARGO) test --locked -p sheer-simulation --test seeds
	$(if $(SEED),,ORDERS=$(SEEDS) $(CARGO) test --locked -p sheer-interleave)

.PHONY: end-to-end
end-to-end: ## The demonstration, started and judged from outside (as root, and as an ordinary user)
	$(CARGO) build --locked -p sheer
	@scripts/end-to-end $(TARGET)/debug/sheer

.PHONY: faults
faults: ## Make every fault of the fault plan, at length (about an hour); writes docs/reliability.md
	@scripts/packages test
	$(CARGO) build --locked -p sheer
	@scripts/faults $(ARGS)

.PHONY: guards
guards: ## Switch safeguards off one at a time: a test must notice each (writes docs/security/guards.md, an hour)
	@scripts/packages test
	@status=0; scripts/guards $(ARGS) || status=$$?; scripts/guards --write; exit $$status

# Results are the release build's; PROFILE=quick for a working tree.
PROFILE ?= release

.PHONY: bench-tools
bench-tools:
	@scripts/packages bench
	$(CARGO) build --locked --release --manifest-path bench/tools/Cargo.toml --target-dir bench/tools/target

# Optimisation hardly changes what is allocated, so the build that counts is the quick one, kept under another name.
.PHONY: bench
bench: bench-tools ## Measure Sheer beside Envoy, HAProxy and nginx (see bench/README.md; about 15 minutes)
	$(CARGO) build --locked --profile quick -p sheer --features count-allocations
	@cp $(TARGET)/quick/sheer $(TARGET)/quick/sheer-counting
	$(CARGO) build --locked --profile $(PROFILE) -p sheer
	@ENVOY=$$(scripts/envoy $(TARGET)) SHEER=$(TARGET)/$(PROFILE)/sheer COUNTING=$(TARGET)/quick/sheer-counting python3 bench/run.py $(ARGS)

.PHONY: soak
soak: bench-tools ## Carry load over the mesh path for 30 minutes: does anything grow? (writes bench/SOAK.md)
	$(CARGO) build --locked --profile $(PROFILE) -p sheer
	@SHEER=$(TARGET)/$(PROFILE)/sheer python3 bench/soak.py --write $(ARGS)

# What the comparisons need of PyPI, below target/: parsers written by others, HPACK, a WebSocket server.
FRAMING := $(TARGET)/framing
$(FRAMING)/bin/python: scripts/framing-requirements.txt
	python3 -m venv $(FRAMING)
	$(FRAMING)/bin/pip install --quiet --requirement $<
	@touch $@

.PHONY: framing
framing: $(FRAMING)/bin/python ## Play hostile messages against Sheer, Envoy and HAProxy (writes docs/security/framing.md)
	@scripts/packages compare
	$(CARGO) build --locked -p sheer-proxy --example mesh_path
	@ENVOY=$$(scripts/envoy $(TARGET)) MESH_PATH=$(TARGET)/debug/examples/mesh_path $(FRAMING)/bin/python scripts/framing --write $(ARGS)

.PHONY: resources
resources: ## Slow, many and greedy clients against Sheer, Envoy and HAProxy, as root (writes docs/security/resources.md, an hour)
	@scripts/packages resources
	$(CARGO) build --locked --profile $(PROFILE) -p sheer-proxy --example mesh_path
	@ENVOY=$$(scripts/envoy $(TARGET)) MESH_PATH=$(TARGET)/$(PROFILE)/examples/mesh_path python3 scripts/resources --write $(ARGS)

.PHONY: differential
differential: $(FRAMING)/bin/python ## Compare our HTTP/1 parser with h11 and llhttp over generated messages
	$(CARGO) build --locked -p sheer-proxy --example read_http1
	@READ_HTTP1=$(TARGET)/debug/examples/read_http1 $(FRAMING)/bin/python scripts/differential $(ARGS)

# libFuzzer needs a nightly compiler; what the targets check is checked by `make test` on the pinned one.
NIGHTLY ?= nightly
TARGETS ?=
SECONDS ?= 600

.PHONY: fuzz
fuzz: $(CARGO_FUZZ) ## Run the fuzz targets, each for SECONDS (600) of CPU time; TARGETS='chunks path' for some (writes docs/security/fuzzing.md)
	@scripts/packages fuzz
	@$(CARGO) +$(NIGHTLY) --version >/dev/null 2>&1 || { \
	  echo "error: no nightly compiler, whose coverage libFuzzer needs: rustup toolchain install nightly --profile minimal (or NIGHTLY=name of one)" >&2; exit 1; }
	RUSTUP_TOOLCHAIN=$(NIGHTLY) $(CARGO_FUZZ) fuzz build --fuzz-dir fuzz --target-dir fuzz/target
	@scripts/fuzz --write --seconds $(SECONDS) --targets '$(TARGETS)' $(ARGS)

$(CARGO_FUZZ):
	$(CARGO) install --quiet --debug --locked --force cargo-fuzz@$(CARGO_FUZZ_VERSION) --root $(TOOLS) --target-dir $(TOOLS)/build-fuzz
	@mv $(TOOLS)/bin/cargo-fuzz $@
	@rm -rf $(TOOLS)/build-fuzz

# The HTTP/2 cases of others, as `deny` installs its tool.
$(HTTPWG):
	$(CARGO) install --quiet --debug --locked --force httpwg-cli@$(HTTPWG_VERSION) --root $(TOOLS) --target-dir $(TOOLS)/build-httpwg
	@mv $(TOOLS)/bin/httpwg $@
	@rm -rf $(TOOLS)/build-httpwg

.PHONY: conformance
conformance: $(HTTPWG) ## Play the HTTP/2 cases of httpwg-cli against Sheer, Envoy and HAProxy (writes docs/security/http2.md)
	@scripts/packages compare
	$(CARGO) build --locked -p sheer-proxy --example mesh_path
	@ENVOY=$$(scripts/envoy $(TARGET)) MESH_PATH=$(TARGET)/debug/examples/mesh_path HTTPWG=$(HTTPWG) python3 scripts/conformance --write $(ARGS)

# Optimised: what a good client has to suffer meanwhile is among what is measured.
.PHONY: floods
floods: ## Flood Sheer, Envoy and HAProxy over HTTP/2 beside a good client (writes docs/security/floods.md)
	@scripts/packages compare
	$(CARGO) build --locked --profile quick -p sheer-proxy --example mesh_path
	@ENVOY=$$(scripts/envoy $(TARGET)) MESH_PATH=$(TARGET)/quick/examples/mesh_path python3 scripts/floods --write $(ARGS)

# Another Python's packages, and therefore in a directory of their own.
AUTOBAHN := $(TARGET)/autobahn
$(AUTOBAHN)/autobahntestsuite: scripts/autobahn-requirements.txt
	@rm -rf $(AUTOBAHN)
	python27=$$(scripts/python27) && $$python27 -m pip install --quiet --disable-pip-version-check --target $(AUTOBAHN) --requirement $<
	@touch $@

.PHONY: websocket
websocket: $(FRAMING)/bin/python $(AUTOBAHN)/autobahntestsuite ## Play the Autobahn suite through Sheer, Envoy and HAProxy, and without (writes docs/security/websocket.md)
	@scripts/packages compare
	$(CARGO) build --locked -p sheer-proxy --example mesh_path
	@ENVOY=$$(scripts/envoy $(TARGET)) MESH_PATH=$(TARGET)/debug/examples/mesh_path AUTOBAHN=$(AUTOBAHN) PYTHON27=$$(scripts/python27) \
		$(FRAMING)/bin/python scripts/websocket --write $(ARGS)

.PHONY: clean
clean: ## Remove everything that was built
	$(CARGO) clean
