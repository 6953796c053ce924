#!/usr/bin/env bash
# What the data path makes of a link: one big file in order and at random, against
# `curl` of the same bytes over the same link, and warm.
#
# Usage: [MIB=1024] [MBIT=500] [RTT_MS=20] misc/bench/datapath.sh        (as root)
# Prints; judges nothing. The link is a relay on this machine.
source "$(dirname "$0")/common.sh"

NYDUS_BIN_DIR=$BIN "$BIN/datapath" --mib "${MIB:-1024}" --mbit "${MBIT:-500}" \
  --rtt-ms "${RTT_MS:-20}"
