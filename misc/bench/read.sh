#!/usr/bin/env bash
# How fast every file of an image reads through FUSE, against the same files on disk.
#
# Usage: [RUNS=5] [TREE=dir] misc/bench/read.sh        (as root)
# Prints medians and ratios; judges nothing. The page cache is dropped before every
# measurement. "warm" has all chunks in the local cache, "cold" none of them, with the
# blobs in a local directory.
source "$(dirname "$0")/common.sh"

mkdir "$scratch/blobs" "$scratch/mount"
"$BIN/nydus-image" -l warn create --bootstrap "$scratch/image.boot" \
  --blob-dir "$scratch/blobs" "$TREE"

daemon=
unmount_image() {
  [ -n "$daemon" ] || return 0
  kill "$daemon"
  wait "$daemon"
  daemon=
}
trap 'unmount_image; rm -rf "$scratch"' EXIT

# mount_image CACHE: with chunks kept in the directory CACHE.
mount_image() {
  "$BIN/nydusd" -l warn mount "$scratch/image.boot" "$scratch/mount" \
    --localfs-dir "$scratch/blobs" --cache-dir "$1" &
  daemon=$!
  until mountpoint -q "$scratch/mount"; do
    kill -0 "$daemon"
    sleep 0.01
  done
}

drop_caches() {
  sync
  echo 3 >/proc/sys/vm/drop_caches
}

read_all() { find "$1" -xdev -type f -print0 | xargs -0 -r cat >/dev/null; }

for _ in $(seq "$RUNS"); do
  drop_caches
  seconds read_all "$TREE" >>"$scratch/disk"

  rm -rf "$scratch/cache"
  mount_image "$scratch/cache"
  drop_caches
  seconds read_all "$scratch/mount" >>"$scratch/cold"
  unmount_image

  mount_image "$scratch/cache"
  drop_caches
  seconds read_all "$scratch/mount" >>"$scratch/warm"
  unmount_image
done

disk=$(median "$scratch/disk")
printf '%-32s %12s %8s\n' \
  "$(du -sm --apparent-size "$TREE" | cut -f 1) MiB, $RUNS runs" 'seconds' ratio \
  "files on $(stat -f -c %T "$TREE")" "$disk" 1.00 \
  'FUSE, warm chunk cache' "$(median "$scratch/warm")" "$(ratio "$(median "$scratch/warm")" "$disk")" \
  'FUSE, cold chunk cache' "$(median "$scratch/cold")" "$(ratio "$(median "$scratch/cold")" "$disk")"
