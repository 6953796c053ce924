#!/usr/bin/env bash
# How long a program of the demo image takes from nothing, over a slow link, mounted
# lazily and built in several ways, against pulling and unpacking all of it.
#
# Usage: [RUNS=5] [MBIT=100] [RTT_MS=20] misc/bench/coldstart.sh        (as root)
# Prints medians and ratios; judges nothing. The link is a relay on this machine. "list"
# prefetches the files that an earlier run has read.
source "$(dirname "$0")/common.sh"

list=$PWD/$scratch/list
export NYDUS_BIN_DIR=$BIN
"$BIN/coldstart" --runs "$RUNS" --mbit "${MBIT:-100}" --rtt-ms "${RTT_MS:-20}" \
  'default||' \
  'the same through FUSE||--driver fuse' \
  "recording||--record-files $list" \
  "list||--prefetch-files $list" \
  'batches of 256 KiB|--batch-size 0x40000|' \
  'no batches|--batch-size 0|' \
  'level 1|--compression-level 1|' \
  'chunks of 512 KiB|--chunk-size 0x80000|' \
  'chunks of 256 KiB|--chunk-size 0x40000|'

# The same program in a pod.
misc/bench/podstart.sh
