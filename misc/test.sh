#!/usr/bin/env bash
# Everything that must pass before a change lands; prints how long each stage took.
#
# Usage: misc/test.sh     (as root: the tests mount file systems)
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$HOME/.cargo/bin:$PATH"
# Errors of tests carry their whole chain; where it was made helps nobody.
export RUST_LIB_BACKTRACE=0
# Images written by Nydus v2.4: too big for this repository. Where they do not lie beside
# the checkout, the tests that need them are left out, and the last lines say so.
if [ -z "${NYDUS_FIXTURES:-}" ]; then
  if [ -d ../shared/fixtures ]; then
    NYDUS_FIXTURES=$(cd ../shared/fixtures && pwd)
  else
    NYDUS_FIXTURES=none
  fi
fi
export NYDUS_FIXTURES

stage() {
  local name=$1 began=$SECONDS
  shift
  echo "== $name"
  "$@"
  echo "== $name: $((SECONDS - began)) s"
}

format() {
  cargo fmt --all --check
  # Workspaces of their own.
  cargo fmt --manifest-path tests/oracle/Cargo.toml --check
  cargo fmt --manifest-path tests/fuzz/Cargo.toml --check
}

# The tests with Dragonfly are no part of "all targets": `make test-p2p` runs them.
lint() {
  cargo clippy --locked --workspace --all-targets -- -D warnings
  cargo clippy --locked --workspace --test p2p -- -D warnings
}

# Published crates of another implementation as second reader and builder. The lock file
# pins what it knows; a dependency that the product gained since is added, not refused.
oracle() {
  (cd tests/oracle && NYDUS_IMAGE=$NYDUS_BIN_DIR/nydus-image cargo test)
}

stage install misc/install.sh
stage format format
stage lint lint
stage docs env RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps
stage build cargo build --locked --workspace --all-targets
# The programs just built: without this, the end-to-end tests would build them once more,
# with the features of these two packages alone.
export NYDUS_BIN_DIR=$PWD/target/debug
stage test cargo test --locked --workspace
stage oracle oracle
stage fuzz misc/fuzz.sh 20

echo "== all passed in $SECONDS s"
if [ "$NYDUS_FIXTURES" = none ]; then
  echo "== WITHOUT the images of Nydus v2.4: set NYDUS_FIXTURES to their directory to have"
  echo "== them read by the library, by both mounts and by the second reader"
fi
