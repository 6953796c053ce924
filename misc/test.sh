#!/usr/bin/env bash
# Everything that must pass before a change lands; prints how long each stage took.
#
# Usage: misc/test.sh     (as root: the tests mount file systems)
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$HOME/.cargo/bin:$PATH"
# Errors of tests carry their whole chain; where it was made helps nobody.
export RUST_LIB_BACKTRACE=0
# Images written by Nydus v2.4, if they lie beside the checkout.
if [ -z "${NYDUS_FIXTURES:-}" ] && [ -d ../shared/fixtures ]; then
  NYDUS_FIXTURES=$(cd ../shared/fixtures && pwd)
  export NYDUS_FIXTURES
fi

stage() {
  local name=$1 began=$SECONDS
  shift
  echo "== $name"
  "$@"
  echo "== $name: $((SECONDS - began)) s"
}

stage install misc/install.sh
stage format cargo fmt --all --check
stage lint cargo clippy --locked --workspace --all-targets -- -D warnings
stage docs env RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps
stage build cargo build --locked --workspace --all-targets
# The programs just built: without this, the end-to-end tests would build them once more,
# with the features of these two packages alone.
export NYDUS_BIN_DIR=$PWD/target/debug
stage test cargo test --locked --workspace
