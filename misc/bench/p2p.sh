#!/usr/bin/env bash
# What a real Dragonfly brings to nodes that start the same image from a slow registry:
# time for each node, and bytes that the registry sends.
#
# Usage: [MBIT=100] [PARTS=start] [SVG=file] misc/bench/p2p.sh [OPTIONS OF p2p]     (as root)
# Prints; judges nothing. PARTS is any of "start daemons compare"; "start" takes three
# minutes, the others longer. Machines are network namespaces of this one, so only ratios
# within one run mean anything. Builds Dragonfly if it is missing, which takes 20 minutes.
source "$(dirname "$0")/common.sh"

NYDUS_DRAGONFLY=$(misc/dragonfly/install.sh)
export NYDUS_DRAGONFLY NYDUS_BIN_DIR=$BIN
arguments=(--mbit "${MBIT:-100}")
for part in ${PARTS:-start}; do
  arguments+=(--part "$part")
done
[ -z "${SVG:-}" ] || arguments+=(--svg "$SVG")
"$BIN/p2p" "${arguments[@]}" "$@"
