#!/usr/bin/env bash
# How fast a directory becomes an image, against `tar | zstd -3 -T2` on the same tree.
#
# Usage: [RUNS=5] [TREE=dir] misc/bench/build.sh
# Prints medians and ratios; judges nothing. The tree is read once before, so both
# find it in the page cache, and both take turns, so that both meet the same noise.
source "$(dirname "$0")/common.sh"

archive() { tar -C "$TREE" -cf - . | zstd -q -3 -T2 -o "$scratch/tree.tar.zst"; }
build() {
  "$BIN/nydus-image" -l warn create --bootstrap "$scratch/image.boot" \
    --blob-dir "$scratch/blobs" "$TREE"
}

tar -C "$TREE" -cf - . | cat >/dev/null
for _ in $(seq "$RUNS"); do
  rm -f "$scratch/tree.tar.zst"
  seconds archive >>"$scratch/archive"
  rm -rf "$scratch/blobs"
  mkdir "$scratch/blobs"
  seconds build >>"$scratch/build"
done

archive_size=$(stat -c %s "$scratch/tree.tar.zst")
build_size=$(cat "$scratch"/blobs/* "$scratch/image.boot" | wc -c)
archive_time=$(median "$scratch/archive")
build_time=$(median "$scratch/build")
printf '%-26s %12s %12s %8s\n' \
  "$(du -sm --apparent-size "$TREE" | cut -f 1) MiB, $RUNS runs" 'tar|zstd' nydus-image ratio \
  'time in s (median)' "$archive_time" "$build_time" "$(ratio "$build_time" "$archive_time")" \
  'size in bytes' "$archive_size" "$build_size" "$(ratio "$build_size" "$archive_size")"
