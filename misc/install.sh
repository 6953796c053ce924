#!/usr/bin/env bash
# Installs what building, testing and the demo need on a Debian machine, as root.
#
# Usage: misc/install.sh
# Does nothing, quickly, when everything is there; safe to run again at any time.
set -euo pipefail

packages=(
  build-essential ca-certificates curl # zstd's C sources; the Rust installer
  mmdebstrap                           # root file system of the demo image
  nginx-light                          # TLS and signed links in front of that registry
  docker-registry skopeo               # a real registry and an independent client for it
  apache2-utils openssl                # htpasswd, and keys for a registry's token server
  erofs-utils                          # fsck.erofs and dump.erofs judge our metadata
  containerd runc procps               # containers that start from our images; pgrep
  iproute2                             # networks of their own for the tests: ip, tc
  cryptsetup-bin                       # veritysetup judges exported disks
  cmake perl pkg-config libssl-dev     # what the second reader in tests/oracle is built with
  attr acl tar gzip xz-utils zstd      # the trees and archives that the tests make
  e2fsprogs fio util-linux             # benches: ext4 to compare with; loop devices, mount
)

missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || echo none)
  [ "$status" = installed ] || missing+=("$package")
done

if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" != 0 ]; then
    echo "misc/install.sh: run as root, or install by hand: ${missing[*]}" >&2
    exit 1
  fi
  echo "installing Debian packages: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  # Debian starts these as services; we start our own on free ports.
  for service in docker-registry nginx; do
    if [[ " ${missing[*]} " == *" $service"* ]] && [ -d /run/systemd/system ]; then
      systemctl disable --quiet --now "$service" ||
        echo "misc/install.sh: could not stop the $service service; it may stay" >&2
    fi
  done
fi

if ! command -v cargo >/dev/null && [ ! -x "$HOME/.cargo/bin/cargo" ]; then
  echo "installing Rust with rustup"
  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs |
    sh -s -- -y --quiet --profile minimal --default-toolchain none
  # The version that rust-toolchain.toml names.
  (cd "$(dirname "$0")/.." && "$HOME/.cargo/bin/rustup" toolchain install)
fi

# A small S3-compatible server that verifies signatures. Cargo is there anyway, so this is
# the one that installs everywhere; unoptimised, because that is quicker to build.
export PATH="$HOME/.cargo/bin:$PATH"
if ! command -v s3s-fs >/dev/null; then
  echo "installing s3s-fs with cargo"
  (cd "$(dirname "$0")/.." && cargo install --quiet --locked --debug s3s-fs@0.14.1 --features binary)
fi
