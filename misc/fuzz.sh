#!/bin/sh
# Runs every fuzz target for SECONDS (default 30) and fails on the first finding.
#
#   misc/fuzz.sh [SECONDS] [TARGET...]
#
# Needs a nightly toolchain and cargo-fuzz (cargo install cargo-fuzz). Starts from
# the golden image, layers built on the spot, and the stored images of
# NYDUS_FIXTURES if that is set. An input that fails stays in
# tests/fuzz/artifacts/TARGET; it belongs, cut down, into a test beside the code.
#
# FUZZ_SANITIZER (default address) and FUZZ_RSS_MB (default 2048) change how
# targets are built and how much memory one may take.
set -eu

seconds=${1:-30}
[ $# -eq 0 ] || shift
targets=${*:-bootstrap blob_meta toc tar_source}
sanitizer=${FUZZ_SANITIZER:-address}
rss=${FUZZ_RSS_MB:-2048}

cd "$(dirname "$0")/.."
(
    cd tests/fuzz
    # Without arguments after CORPUS only what the repository itself has.
    cargo run --quiet --example seeds -- corpus ${NYDUS_FIXTURES:+"$NYDUS_FIXTURES"}
)
for target in $targets; do
    echo "== $target: $seconds s"
    cargo +nightly fuzz run --fuzz-dir tests/fuzz --sanitizer "$sanitizer" "$target" -- \
        -max_total_time="$seconds" -rss_limit_mb="$rss" -malloc_limit_mb="$rss" \
        -timeout=20 -max_len=262144 -print_final_stats=1 -verbosity=0
done
