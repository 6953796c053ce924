#!/usr/bin/env bash
# How fast one thread reads resident data through `storage` alone, against plain reads
# of the cache file and against copying memory.
#
# Usage: [KIB=1024] [MIB=256] [RUNS=5] misc/bench/warmread.sh
# Prints every run; judges nothing.
source "$(dirname "$0")/common.sh"

for _ in $(seq "$RUNS"); do
  "$BIN/warmread" --kib "${KIB:-1024}" --mib "${MIB:-256}"
done
