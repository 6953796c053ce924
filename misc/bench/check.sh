#!/usr/bin/env bash
# How fast an image is checked and unpacked and its layers are merged, beside zstd and a
# hash alone on the same bytes.
#
# Usage: [RUNS=5] [TREE=dir] misc/bench/check.sh
# Prints medians; judges nothing. Rates are bytes of uncompressed data by wall time, and
# by processor time (user and system): the latter is the rate of one core, also while
# other work slows the machine. All input is in the page cache.
source "$(dirname "$0")/common.sh"

nydus_image() { "$BIN/nydus-image" -l warn "$@"; }

# An archive for the references, images with and without batches, and the same tree as
# four layers.
tar -C "$TREE" -cf "$scratch/tree.tar" .
zstd -q -3 -o "$scratch/tree.tar.zst" "$scratch/tree.tar"
gzip -c -6 "$scratch/tree.tar" >"$scratch/tree.tar.gz"
mkdir "$scratch/blobs"
# image NAME ARGUMENTS...
image() {
  local name=$1
  shift
  nydus_image create --bootstrap "$scratch/$name.boot" --blob-dir "$scratch/blobs" "$@"
}
image plain "$TREE"
image batches --batch-size 0x40000 "$TREE"
image zran --type targz-ref "$scratch/tree.tar.gz"
mv "$scratch/tree.tar.gz" "$scratch/blobs/$(sha256sum <"$scratch/tree.tar.gz" | cut -d ' ' -f 1)"
layers=()
for layer in 1 2 3 4; do
  cp "$scratch/plain.boot" "$scratch/layer$layer.boot"
  layers+=("$scratch/layer$layer.boot")
done

bytes=$(stat -c %s "$scratch/tree.tar")
TIMEFORMAT='%R %U %S'
# measure NAME COMMAND...: wall and processor seconds of one run, added to its lists.
measure() {
  local name=$1 wall user system
  shift
  read -r wall user system < <({ time "$@" >/dev/null; } 2>&1)
  echo "$wall" >>"$scratch/$name.wall"
  awk -v u="$user" -v s="$system" 'BEGIN { print u + s }' >>"$scratch/$name.cpu"
}
unpack() {
  nydus_image unpack "$scratch/$1.boot" --blob-dir "$scratch/blobs" --output "$scratch/out.tar"
}

names=(zstd-d hash check-plain check-batches check-zran unpack merge)
for _ in $(seq "$RUNS"); do
  measure zstd-d zstd -q -d -c "$scratch/tree.tar.zst"
  measure hash "$(command -v b3sum || echo sha256sum)" "$scratch/tree.tar"
  for name in plain batches zran; do
    measure "check-$name" nydus_image check --blob-dir "$scratch/blobs" "$scratch/$name.boot"
  done
  measure unpack unpack batches
  measure merge nydus_image merge --bootstrap "$scratch/merged" "${layers[@]}"
done

echo "$((bytes >> 20)) MiB, $(nproc) cores, median of $RUNS runs"
printf '%-14s %8s %8s %8s %10s\n' '' seconds cpu GB/s GB/s/core
for name in "${names[@]}"; do
  wall=$(median "$scratch/$name.wall")
  cpu=$(median "$scratch/$name.cpu")
  if [ "$name" = merge ]; then
    printf '%-14s %8s %8s\n' "$name" "$wall" "$cpu"
  else
    printf '%-14s %8s %8s %8s %10s\n' "$name" "$wall" "$cpu" \
      "$(ratio "$bytes" "$(awk -v t="$wall" 'BEGIN { print t * 1e9 }')")" \
      "$(ratio "$bytes" "$(awk -v t="$cpu" 'BEGIN { print t * 1e9 }')")"
  fi
done
