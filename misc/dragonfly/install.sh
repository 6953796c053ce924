#!/usr/bin/env bash
# Builds the real Dragonfly that the tests of peer-to-peer transfer run: its scheduler with
# Go, its node agent `dfdaemon` and its control program `dfctl` with cargo.
#
# Usage: misc/dragonfly/install.sh [DIRECTORY]
#
# DIRECTORY (default: $NYDUS_DRAGONFLY, else /var/cache/nydus-dragonfly) lies outside the
# checkout, because building takes about 20 minutes; what lies there is used again if its
# version fits. Prints the directory.
set -euo pipefail
cd "$(dirname "$0")/../.."
scheduler=$(awk '$2 == "d7y.io/dragonfly/v2" { print $3 }' misc/dragonfly/scheduler/go.mod)
client=1.5.10
into=${1:-${NYDUS_DRAGONFLY:-/var/cache/nydus-dragonfly}}
mkdir -p "$into/bin"
into=$(realpath "$into")
export PATH="$HOME/.cargo/bin:$PATH"

# RocksDB's bindings want clang, the protocol's want protoc with its own files, aws-lc cmake.
packages=(build-essential clang cmake libclang-dev libprotobuf-dev protobuf-compiler)

install_packages() {
  local missing=() package
  for package in "${packages[@]}"; do
    dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null |
      grep -qx installed || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return
  if [ "$(id -u)" != 0 ]; then
    echo "misc/dragonfly/install.sh: run as root, or install by hand: ${missing[*]}" >&2
    exit 1
  fi
  echo "installing Debian packages: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# `go install …@version` asks for the module's list of versions, which not every proxy of
# modules gives; a module of our own that depends on it builds without, from pinned sums.
build_scheduler() {
  command -v go >/dev/null || {
    echo "misc/dragonfly/install.sh: install Go 1.25 or later" >&2
    exit 1
  }
  (cd misc/dragonfly/scheduler &&
    CGO_ENABLED=0 go build -mod=readonly -o "$into/bin/scheduler" d7y.io/dragonfly/v2/cmd/scheduler)
}

# One step of optimisation instead of three: it halves the build, and the tests of transfer
# over a slow link do not see the difference.
build_client() {
  CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
    CARGO_PROFILE_RELEASE_DEBUG=0 CARGO_TARGET_DIR=$into/build \
    cargo install --locked --quiet --root "$into" --bin dfdaemon --bin dfctl \
    "dragonfly-client@$client"
  rm -rf "$into/build"
}

# The version beside the program, because the scheduler of v2.5.1 calls itself v2.5.0.
has() {
  [ -x "$into/bin/$1" ] && [ "$(cat "$into/bin/$1.version" 2>/dev/null)" = "$2" ]
}

{
  if ! has scheduler "$scheduler"; then
    echo "building Dragonfly's scheduler $scheduler with Go"
    build_scheduler
    echo "$scheduler" >"$into/bin/scheduler.version"
  fi
  if ! has dfdaemon "$client"; then
    install_packages
    echo "building dfdaemon $client with cargo; about 20 minutes on two processors"
    build_client
    echo "$client" >"$into/bin/dfdaemon.version"
  fi
} >&2
echo "$into"
