# What a newcomer needs: `make help`.
SHELL := /bin/bash
# The Rust installer puts cargo here; a shell that was open before does not know it yet.
export PATH := $(HOME)/.cargo/bin:$(PATH)

.PHONY: help install build demo test test-containerd2 dragonfly test-p2p soak bench docs clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## Install Debian packages and Rust, if missing (as root)
	@misc/install.sh

build: install ## Build nydusd, nydus-image and nydus-snapshotter, optimised, into target/release
	cargo build --release --locked -p nydusd -p nydus-image -p snapshotter -p e2e

demo: build ## Convert an image, mount it lazily, run it, compare; IMAGE=ref for your own
	NYDUS_BIN_DIR=target/release target/release/demo $(if $(IMAGE),'$(IMAGE)')

test: ## Check format and lints, run all tests (as root)
	@misc/test.sh

test-containerd2: install ## Run the tests with containerd again, with a current one built by Go
	programs=$$(misc/containerd2.sh) && PATH="$$programs:$$PATH" \
	  cargo test --locked --workspace --test containerd

dragonfly: install ## Build a real Dragonfly (20 minutes, once) and say how to start a cluster
	@programs=$$(misc/dragonfly/install.sh) && \
	  echo "Dragonfly is in $$programs/bin: scheduler $$(cat $$programs/bin/scheduler.version)," \
	    "dfdaemon $$(cat $$programs/bin/dfdaemon.version)" && \
	  echo "misc/dragonfly/cluster.sh start    a cluster on 127.0.0.1: scheduler, seed, node" && \
	  echo "misc/dragonfly/cluster.sh status   what it has sent, and from where" && \
	  echo "misc/dragonfly/cluster.sh stop     ends it" && \
	  echo "docs/dragonfly.md says how nydusd uses it; make test-p2p tests it"

test-p2p: install ## Run the tests with a real Dragonfly (as root)
	@misc/test-p2p.sh

soak: install ## Run the long versions of randomised tests, as root; SEED=n repeats a run of readers
	CACHE_CUTS=200 cargo test --locked --workspace --test crash
	NYDUS_KILLS=1000 cargo test --locked --workspace --test e2e -- --nocapture --test-threads 1 kills
	NYDUS_SOAK=10000 NYDUS_SOAK_SEED=$(or $(SEED),1) cargo test --locked --workspace --test e2e \
	  readers_survive -- --nocapture

bench: build ## Print speeds against tar, zstd, curl and ext4 (as root)
	misc/bench/build.sh
	misc/bench/read.sh
	misc/bench/mount.sh
	misc/bench/fuse.sh
	misc/bench/datapath.sh
	misc/bench/warmread.sh
	misc/bench/coldstart.sh

docs: ## Build the API documentation, warnings denied
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps --document-private-items

clean: ## Remove what was built, images of the demo included
	cargo clean
	rm -rf out
