#!/bin/sh
# Runs every fuzz target for SECONDS (default 20) and fails on the first finding.
#
#   misc/fuzz.sh [SECONDS] [TARGET...]
#
# Needs only the toolchain of this repository and a C++ compiler: the flags below are
# what `cargo fuzz` would pass, and those that find coverage are stable. The crate has
# cargo-fuzz's layout too, for those who like its commands (and a nightly toolchain).
#
# Starts from the golden image, layers built on the spot, and the stored images of
# NYDUS_FIXTURES if it names a folder. An input that fails stays in
# tests/fuzz/artifacts/TARGET; it belongs, cut down, into a test beside the code.
#
# FUZZ_SANITIZER=address (default none) looks for memory errors as well, at half the
# speed; the targets themselves bound the memory that an input may take.
# FUZZ_RSS_MB (default 2048) bounds the process.
set -eu

seconds=${1:-20}
[ $# -eq 0 ] || shift
targets=${*:-bootstrap blob_meta toc tar_source api_request event}
sanitizer=${FUZZ_SANITIZER:-none}
rss=${FUZZ_RSS_MB:-2048}
fixtures=${NYDUS_FIXTURES:-none}
[ "$fixtures" != none ] || fixtures=

cd "$(dirname "$0")/../tests/fuzz"
flags="--cfg fuzzing -Cpasses=sancov-module"
flags="$flags -Cllvm-args=-sanitizer-coverage-level=4"
flags="$flags -Cllvm-args=-sanitizer-coverage-inline-8bit-counters"
flags="$flags -Cllvm-args=-sanitizer-coverage-pc-table"
flags="$flags -Cllvm-args=-sanitizer-coverage-trace-compares"
if [ "$sanitizer" != none ]; then
    # An unstable flag that the stable compiler has as well.
    export RUSTC_BOOTSTRAP=1
    flags="$flags -Zsanitizer=$sanitizer"
fi
host=$(rustc -vV | sed -n 's/^host: //p')
# A target of its own, although it is the host: build scripts and macros stay as they are.
# The seeds are made by the same build, so everything is compiled once. The lock file
# pins what it knows; a dependency that the product gained since is added, not refused.
RUSTFLAGS=$flags cargo build --release --target "$host" --bins --example seeds
built=../../target/fuzz/$host/release
# Without arguments after CORPUS only what the repository itself has.
"$built/examples/seeds" corpus ${fixtures:+"$fixtures"}

for target in $targets; do
    echo "== $target: $seconds s"
    mkdir -p "artifacts/$target"
    "$built/$target" "corpus/$target" -artifact_prefix="artifacts/$target/" \
        -max_total_time="$seconds" -rss_limit_mb="$rss" -malloc_limit_mb="$rss" \
        -timeout=20 -max_len=262144 -print_final_stats=1 -verbosity=0
done
