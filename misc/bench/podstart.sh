#!/usr/bin/env bash
# How long a pod takes from the pull of its image to its program's first output, over a
# slow link: with nydus-snapshotter, against containerd's overlayfs snapshotter and
# stargz-snapshotter with an eStargz image, each through CRI and from nothing.
#
# Usage: [RUNS=5] [MBIT=100] [RTT_MS=20] misc/bench/podstart.sh        (as root)
# Prints medians and ratios; judges nothing. Installs stargz's converter, and builds its
# snapshotter with Go (go.dev), because Debian has it as a library only.
source "$(dirname "$0")/common.sh"

command -v go >/dev/null || {
  echo "misc/bench/podstart.sh: install Go 1.25 or later, to build stargz-snapshotter" >&2
  exit 1
}
command -v ctr-remote >/dev/null ||
  apt-get install -y -qq --no-install-recommends stargz-snapshotter >/dev/null
stargz=$PWD/out/stargz-snapshotter
(cd misc/bench/stargz && go build -o "$stargz" .)

NYDUS_BIN_DIR=$BIN "$BIN/podstart" --runs "$RUNS" --mbit "${MBIT:-100}" \
  --rtt-ms "${RTT_MS:-20}" --stargz "$stargz"
