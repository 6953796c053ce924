#!/usr/bin/env bash
# The tests with a real Dragonfly: builds it if it is missing, then runs them.
#
# Usage: misc/test-p2p.sh [ARGUMENTS OF CARGO TEST]     (as root: networks and mounts)
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$HOME/.cargo/bin:$PATH"
# Errors of tests carry their whole chain; where it was made helps nobody.
export RUST_LIB_BACKTRACE=0
began=$SECONDS

misc/install.sh
NYDUS_DRAGONFLY=$(misc/dragonfly/install.sh)
export NYDUS_DRAGONFLY
echo "== dragonfly: $((SECONDS - began)) s"
# All targets: with fewer, features change and everything would be built again after
# `make test`.
cargo build --locked --workspace --all-targets
export NYDUS_BIN_DIR=${NYDUS_BIN_DIR:-$PWD/target/debug}
cargo test --locked --workspace --test p2p "$@"
echo "== peer-to-peer: all passed in $((SECONDS - began)) s"
