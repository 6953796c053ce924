#!/usr/bin/env bash
# How fast a directory becomes an image, against `tar | zstd -3 -T2` on the same tree.
#
# Usage: [RUNS=5] [TREE=dir] misc/bench/build.sh
# Prints medians and ratios; judges nothing. "plain" has chunks of 1 MiB alone, "batches"
# compresses small files together, and "level 9" tries harder, as `convert` does unless
# told otherwise ("plain 9" is what the level alone does). The tree is read once before,
# so all find it in the page cache, and they take turns, so that all meet the same noise.
source "$(dirname "$0")/common.sh"

archive() { tar -C "$TREE" -cf - . | zstd -q -3 -T2 -o "$scratch/tree.tar.zst"; }
build() {
  "$BIN/nydus-image" -l warn create --batch-size "$2" --compression-level "$3" --bootstrap "$scratch/$1.boot" \
    --blob-dir "$scratch/$1" "$TREE"
}
fresh() { rm -rf "$1" && mkdir "$1"; }

tar -C "$TREE" -cf - . | cat >/dev/null
for _ in $(seq "$RUNS"); do
  rm -f "$scratch/tree.tar.zst"
  seconds archive >>"$scratch/archive.times"
  for kind in 'plain 0 1' 'batches 0x20000 1' 'plain9 0 9' 'level9 0x20000 9'; do
    fresh "$scratch/${kind%% *}"
    # shellcheck disable=SC2086
    seconds build $kind >>"$scratch/${kind%% *}.times"
  done
done

size() { cat "$scratch/$1"/* "$scratch/$1.boot" | wc -c; }
# row NAME TIME SIZE: with both relative to the archive, and the size to plain chunks.
row() {
  printf '%-12s %10s %7s %14s %7s %9s\n' "$1" "$2" "$(ratio "$2" "$archive_time")" "$3" \
    "$(ratio "$3" "$archive_size")" "$(ratio "$3" "$plain_size")"
}
archive_time=$(median "$scratch/archive.times")
archive_size=$(stat -c %s "$scratch/tree.tar.zst")
plain_size=$(size plain)
echo "$(du -sm --apparent-size "$TREE" | cut -f 1) MiB, median of $RUNS runs"
printf '%-12s %10s %7s %14s %7s %9s\n' '' seconds ratio bytes ratio 'to plain'
row 'tar | zstd' "$archive_time" "$archive_size"
row plain "$(median "$scratch/plain.times")" "$plain_size"
row batches "$(median "$scratch/batches.times")" "$(size batches)"
row 'plain 9' "$(median "$scratch/plain9.times")" "$(size plain9)"
row 'level 9' "$(median "$scratch/level9.times")" "$(size level9)"
