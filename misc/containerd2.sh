#!/usr/bin/env bash
# Builds a current containerd 2 with Go, for the tests: Debian 12 has 1.6.
#
# Usage: misc/containerd2.sh [DIRECTORY]        default: out/containerd2
# Prints the directory with the programs, to be put in front of PATH (`make test-containerd2`).
# Its module excludes others, so `go install …@version` refuses it; as a dependency of a
# module of its own it builds.
set -euo pipefail
cd "$(dirname "$0")/.."
version=v2.1.4
mkdir -p "${1:-out/containerd2}"
into=$(realpath "${1:-out/containerd2}")

if [ ! -x "$into/ctr" ] || ! "$into/containerd" --version | grep -qF "${version#v}"; then
  command -v go >/dev/null || {
    echo "misc/containerd2.sh: install Go 1.24 or later" >&2
    exit 1
  }
  module=$(mktemp -d)
  trap 'rm -rf "$module"' EXIT
  programs=(containerd containerd-shim-runc-v2 ctr)
  {
    echo '//go:build tools'
    echo 'package tools'
    printf 'import _ "github.com/containerd/containerd/v2/cmd/%s"\n' "${programs[@]}"
  } >"$module/tools.go"
  printf 'module tools\ngo 1.24\nrequire github.com/containerd/containerd/v2 %s\n' "$version" \
    >"$module/go.mod"
  (
    cd "$module"
    go mod tidy
    for program in "${programs[@]}"; do
      go build -tags 'no_btrfs no_devmapper no_zfs' \
        -ldflags "-X github.com/containerd/containerd/v2/version.Version=${version#v}" \
        -o "$into/$program" "github.com/containerd/containerd/v2/cmd/$program"
    done
  ) >&2
fi
echo "$into"
