#!/usr/bin/env bash
# What a FUSE mount costs: walking it, mounting a large image, memory.
#
# Usage: [RUNS=5] [TREE=dir] [ENTRIES=1000000] misc/bench/fuse.sh        (as root)
# Prints medians; judges nothing. Every walk finds and stats all of TREE with a cold page
# cache, in the mount and where it was made from; the large image has ENTRIES files, most
# of them empty.
source "$(dirname "$0")/common.sh"

ENTRIES=${ENTRIES:-1000000}
mkdir "$scratch"/{blobs,mount,cache}
"$BIN/nydus-image" -l warn create --bootstrap "$scratch/image.boot" \
  --blob-dir "$scratch/blobs" "$TREE"

daemon=
end_daemon() {
  [ -n "$daemon" ] || return 0
  kill "$daemon"
  wait "$daemon" || echo "nydusd ended with $?" >&2
  daemon=
}
trap 'end_daemon; rm -rf "$scratch"' EXIT

# start_daemon ARGUMENTS...: waits until it is ready.
start_daemon() {
  # Not the words of the one before.
  : >"$scratch/log"
  "$BIN/nydusd" --mountpoint "$scratch/mount" "$@" 2>"$scratch/log" &
  daemon=$!
  until grep -q 'ready:' "$scratch/log"; do
    kill -0 "$daemon"
    sleep 0.005
  done
}

# Nothing is cached afterwards but what a walk itself is made of.
drop_caches() {
  sync
  echo 3 >/proc/sys/vm/drop_caches
  walk "$scratch/cache"
}

walk() { "${only[@]}" find "$1" -xdev -printf '%s %m\n' >/dev/null; }
only=()

# one_processor: for the daemon and for walks from now on.
one_processor() {
  local process
  for process in "$daemon" $(pgrep -P "$daemon"); do
    taskset -acp 0 "$process" >/dev/null
  done
  only=(taskset -c 0)
}

# Anonymous memory of the daemon, keeper and worker, in KiB.
anonymous() {
  local process total=0
  for process in "$daemon" $(pgrep -P "$daemon"); do
    total=$((total + $(awk '/^RssAnon/ { print $2 }' "/proc/$process/status")))
  done
  echo "$total"
}

entries=$(find "$TREE" -xdev | wc -l)
start_daemon --bootstrap "$scratch/image.boot" --localfs-dir "$scratch/blobs"
for _ in $(seq "$RUNS"); do
  drop_caches
  seconds walk "$TREE" >>"$scratch/disk"
  drop_caches
  seconds walk "$scratch/mount" >>"$scratch/walk"
done
find "$scratch/mount" -xdev -type f -print0 | xargs -0 -r cat >/dev/null

# walked WHAT FILE: the median of FILE, by entry and against the disk's.
walked() {
  printf '%-44s %10.2f us per entry of %d, %s of %s\n' "$1" \
    "$(awk -v s="$(median "$2")" -v n="$entries" 'BEGIN { print s * 1e6 / n }')" "$entries" \
    "$(ratio "$(median "$2")" "$(median "$scratch/disk")")" "$(stat -f -c %T "$TREE")"
}
walked 'find and stat, cold page cache' "$scratch/walk"
walked 'the same tree on disk' "$scratch/disk"
printf '%-44s %10d KiB\n' 'anonymous memory after reading everything' "$(anonymous)"
# Idle threads end after 10 s, and give back what they had.
sleep 12
printf '%-44s %10d KiB\n' 'the same, idle' "$(anonymous)"
one_processor
for _ in $(seq "$RUNS"); do
  drop_caches
  seconds walk "$scratch/mount" >>"$scratch/walk-one"
done
walked 'find and stat on one processor' "$scratch/walk-one"
only=()
end_daemon

# post PATH: mounts the image there.
post() {
  local config
  config=$(printf '{\\"device\\":{\\"id\\":\\"%s\\",\\"backend\\":{\\"type\\":\\"localfs\\",\\"config\\":{\\"dir\\":\\"%s\\"}},\\"cache\\":{\\"type\\":\\"blobcache\\",\\"config\\":{\\"work_dir\\":\\"%s\\"}}},\\"mode\\":\\"direct\\"}' \
    "$1" "$PWD/$scratch/blobs" "$PWD/$scratch/cache")
  curl -sf --unix-socket "$scratch/api.sock" -X POST \
    -d "{\"source\":\"$PWD/$scratch/image.boot\",\"config\":\"$config\"}" \
    "http://unix/api/v1/mount?mountpoint=$1"
}

start_daemon --apisock "$scratch/api.sock"
until [ -S "$scratch/api.sock" ]; do sleep 0.01; done
post /0
walk "$scratch/mount"
first=$(anonymous)
for index in $(seq 10); do post "/$index"; done
walk "$scratch/mount"
printf '%-44s %10d KiB\n' 'each further mounted image, walked' $((($(anonymous) - first) / 10))
end_daemon

# large COUNT: a tar of that many files.
large() {
  python3 - "$1" <<'PYTHON'
import io, sys, tarfile
tar = tarfile.open(fileobj=sys.stdout.buffer, mode="w|")
for number in range(int(sys.argv[1])):
    member = tarfile.TarInfo("d%04d/file-%07d" % (number // 1000, number))
    data = b"%d" % number if number % 10 == 0 else b""
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
tar.close()
PYTHON
}
large "$ENTRIES" >"$scratch/large.tar"
"$BIN/nydus-image" -l warn create -t tar-rafs --bootstrap "$scratch/large.boot" \
  --blob-dir "$scratch/blobs" "$scratch/large.tar"
for _ in $(seq "$RUNS"); do
  start_daemon --bootstrap "$scratch/large.boot" --localfs-dir "$scratch/blobs"
  sed -n 's/.*ready: .* in \([0-9]*\) ms$/\1/p' "$scratch/log" >>"$scratch/mounting"
  end_daemon
done
printf '%-44s %10s ms\n' "mounting an image of $ENTRIES files" "$(median "$scratch/mounting")"
