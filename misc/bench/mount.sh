#!/usr/bin/env bash
# What serving an image costs against the kernel's EROFS alone, on the same files.
#
# Usage: [RUNS=5] [TREE=dir] misc/bench/mount.sh        (as root)
# Prints medians and ratios; judges nothing. Measured on each of:
#   plain     EROFS without any daemon, all data there
#   complete  driver erofs, all data there: nobody is asked
#   resident  driver erofs, all data there that is read, but not all of the blob
#   fuse      driver fuse, all data there
source "$(dirname "$0")/common.sh"

# A file in the image that nobody reads keeps the blob incomplete for `resident`.
mkdir "$scratch/mount" "$scratch/blobs" "$scratch/unread"
head -c 8388608 /dev/urandom >"$scratch/unread/unread"
tar -C "$TREE" -cf "$scratch/tree.tar" .
tar -C "$scratch/unread" -rf "$scratch/tree.tar" ./unread
"$BIN/nydus-image" -l error create --type tar-rafs --bootstrap "$scratch/image.boot" \
  --blob-dir "$scratch/blobs" "$scratch/tree.tar"
rm "$scratch/tree.tar"

daemon=
unmount_image() {
  if [ -n "$daemon" ]; then
    kill "$daemon"
    wait "$daemon" || echo "nydusd ended with $?" >&2
    daemon=
  elif mountpoint -q "$scratch/mount"; then
    umount "$scratch/mount"
  fi
}
trap 'unmount_image; rm -rf "$scratch"' EXIT

# mount_image DRIVER CACHE
mount_image() {
  "$BIN/nydusd" -l error mount "$scratch/image.boot" "$scratch/mount" --driver "$1" \
    --localfs-dir "$scratch/blobs" --cache-dir "$2" &
  daemon=$!
  until mountpoint -q "$scratch/mount"; do
    kill -0 "$daemon"
    sleep 0.01
  done
}

# mount_plain CACHE: by the new mount API, because mount(8) puts loop devices in between.
mount_plain() {
  python3 - "$scratch/image.boot" "$scratch/mount" "$1"/*.blob.data <<'PYTHON'
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    result = libc.syscall(*args)
    if result < 0:
        sys.exit(os.strerror(ctypes.get_errno()))
    return result
image, point, *devices = map(os.fsencode, sys.argv[1:])
files = call(430, b"erofs", 0)
call(431, files, 1, b"source", os.path.abspath(image), 0)
for device in devices:
    call(431, files, 1, b"device", os.path.abspath(device), 0)
call(431, files, 6, None, None, 0)
mount = call(432, files, 0, 1)
call(429, mount, b"", -100, os.path.abspath(point), 4)
PYTHON
}

drop_caches() {
  sync
  echo 3 >/proc/sys/vm/drop_caches
  # The tools themselves are not what is measured.
  python3 -c 'import os, random, sys'
  find /dev/null -printf '' | xargs -r cat /dev/null
}

largest=$(cd "$TREE" && find . -xdev -type f -printf '%s %p\n' | sort -n | tail -1 | cut -d ' ' -f 2-)
walk() { find "$scratch/mount" -xdev -printf '%s' >/dev/null; }
# Everything but the file that is to stay unread.
read_all() { find "$scratch/mount" -xdev -type f ! -name unread -print0 | xargs -0 -r cat >/dev/null; }
sequential() { cat "$scratch/mount/$largest" >/dev/null; }
random() {
  python3 - "$scratch/mount/$largest" <<'PYTHON'
import os, random, sys
random.seed(1)
file = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
pages = max(os.fstat(file).st_size // 4096, 1)
for _ in range(4000):
    os.pread(file, 4096, random.randrange(pages) * 4096)
PYTHON
}

# measure NAME: of what is mounted.
measure() {
  local what
  for what in walk read_all sequential random; do
    drop_caches
    seconds "$what" >>"$scratch/$1.$what"
  done
  seconds walk >>"$scratch/$1.walk-warm"
}

# Fills both caches: one with everything, one without the unread file.
mount_image fuse "$scratch/complete"
cat "$scratch/mount/unread" >/dev/null
read_all
unmount_image
mount_image fuse "$scratch/resident"
read_all
unmount_image

for _ in $(seq "$RUNS"); do
  mount_plain "$scratch/complete"
  measure plain
  unmount_image
  mount_image erofs "$scratch/complete"
  measure complete
  unmount_image
  mount_image erofs "$scratch/resident"
  measure resident
  unmount_image
  mount_image fuse "$scratch/complete"
  measure fuse
  unmount_image
done

printf '%-10s' "$RUNS runs"
printf ' %18s' 'walk, cold' 'walk, warm' 'read all' 'largest file' '4000 x 4 KiB'
echo
for name in plain complete resident fuse; do
  printf '%-10s' "$name"
  for what in walk walk-warm read_all sequential random; do
    time=$(median "$scratch/$name.$what")
    printf ' %9s s %6sx' "$time" "$(ratio "$time" "$(median "$scratch/plain.$what")")"
  done
  echo
done
