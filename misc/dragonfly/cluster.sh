#!/usr/bin/env bash
# A Dragonfly cluster on this machine, on 127.0.0.1: the scheduler, a seed, and one node.
#
# Usage: misc/dragonfly/cluster.sh start|stop|status
#
#   start    writes the configuration files and starts what does not run
#   stop     ends what `start` has started; what the agents have cached goes with them
#   status   says what runs, and where what the agents sent came from
#
# The programs are those that misc/dragonfly/install.sh has built. Files, logs and process
# ids lie in $NYDUS_DRAGONFLY_RUN (default: /var/cache/nydus-dragonfly/run).
set -euo pipefail
here=$(realpath "$(dirname "$0")")
programs=${NYDUS_DRAGONFLY:-/var/cache/nydus-dragonfly}/bin
run=${NYDUS_DRAGONFLY_RUN:-${NYDUS_DRAGONFLY:-/var/cache/nydus-dragonfly}/run}

# Name and first two digits of the ports of each agent; the node has Dragonfly's usual ones.
agents=('seed 41' 'node 40')

fail() {
  echo "misc/dragonfly/cluster.sh: $*" >&2
  exit 1
}

# running NAME: whether the process that was started as NAME still is one.
running() {
  local process
  process=$(cat "$run/$1/pid" 2>/dev/null) || return 1
  # The number may be somebody else's by now.
  [[ $(readlink "/proc/$process/exe" 2>/dev/null) == "$programs"/* ]]
}

# launch NAME PORT COMMAND...: keeps it running, and waits until it listens.
launch() {
  local name=$1 port=$2 waited=0
  shift 2
  setsid "$@" >"$run/$name/log.txt" 2>&1 </dev/null &
  echo $! >"$run/$name/pid"
  until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
    # Not `running`: until it is executed, this is still the shell.
    kill -0 "$(cat "$run/$name/pid")" 2>/dev/null ||
      fail "$name has ended: $(tail -n 3 "$run/$name/log.txt")"
    [ $((waited += 1)) -lt 600 ] || fail "$name does not listen on $port after a minute"
    sleep 0.1
  done
  echo "$name runs; it listens on 127.0.0.1:$port"
}

start() {
  local agent name ports
  [ -x "$programs/dfdaemon" ] && [ -x "$programs/scheduler" ] ||
    fail "$programs has no Dragonfly: run make dragonfly"
  mkdir -p "$run/scheduler"
  if ! running scheduler; then
    sed "s|@RUN@|$run|" "$here/scheduler.yaml" >"$run/scheduler/config.yaml"
    cp "$here/scheduler-dynconfig.yaml" "$run/scheduler/dynconfig.yaml"
    launch scheduler 8002 "$programs/scheduler" --console \
      --config "$run/scheduler/config.yaml" --dynconfig "$run/scheduler/dynconfig.yaml"
  fi
  for agent in "${agents[@]}"; do
    read -r name ports <<<"$agent"
    running "$name" && continue
    mkdir -p "$run/$name"
    sed -e "s|@RUN@|$run|; s|@NAME@|$name|; s|@PORTS@|$ports|g" \
      -e "s|@SEED@|$([ "$name" = seed ] && echo true || echo false)|" \
      "$here/dfdaemon.yaml" >"$run/$name/config.yaml"
    cp "$here/dfdaemon-dynconfig.yaml" "$run/$name/dynconfig.yaml"
    launch "$name" "${ports}01" "$programs/dfdaemon" --console --log-level info \
      --config "$run/$name/config.yaml" --dynconfig "$run/$name/dynconfig.yaml" \
      --log-dir "$run/$name/log"
  done
  echo "the scheduler uses the seed after at most 30 seconds; logs are $run/*/log.txt"
}

# Agents first: one that cannot tell the scheduler that it ends takes a minute.
stop() {
  local name process waited
  for name in node seed scheduler; do
    running "$name" || continue
    process=$(cat "$run/$name/pid")
    kill "$process"
    waited=0
    while running "$name"; do
      waited=$((waited + 1))
      [ $waited -ne 100 ] || kill -KILL "$process" || echo "$name ended by itself after all" >&2
      [ $waited -lt 200 ] || fail "$name (process $process) does not end"
      sleep 0.1
    done
    echo "$name has ended"
  done
  rm -rf "$run"
}

# counter PORT METRIC [LABEL]: added up, in the agent's own count.
counter() {
  curl -sf "http://127.0.0.1:$1/metrics" |
    awk -v name="$2" -v label="${3:-}" \
      'index($1, name) == 1 && index($0, label) { sum += $NF } END { printf "%d\n", sum }'
}

status() {
  local agent name ports
  if running scheduler; then echo "scheduler  runs"; else echo "scheduler  does not run"; fi
  for agent in "${agents[@]}"; do
    read -r name ports <<<"$agent"
    if ! running "$name"; then
      printf '%-10s does not run\n' "$name"
      continue
    fi
    printf '%-10s runs; requests %s; bytes from the registry %s, from peers %s, from disk %s\n' "$name" \
      "$(counter "${ports}02" dragonfly_client_proxy_request_total)" \
      "$(counter "${ports}02" dragonfly_client_download_traffic BACK_TO_SOURCE)" \
      "$(counter "${ports}02" dragonfly_client_download_traffic REMOTE_PEER)" \
      "$(counter "${ports}02" dragonfly_client_download_traffic LOCAL_PEER)"
  done
}

case ${1:-} in
  start | stop | status) "$1" ;;
  *) fail "usage: $0 start|stop|status" ;;
esac
