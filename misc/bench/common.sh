# Sourced by the benches beside it: the tree they work on, time and medians.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export PATH="$HOME/.cargo/bin:$PATH" LC_ALL=C
RUNS=${RUNS:-5}
BIN=${BIN:-target/release}
TREE=${TREE:-out/demo/root} # any directory; made if it is the default

[ -x "$BIN/nydus-image" ] && [ -x "$BIN/nydusd" ] ||
  cargo build --release --locked -p nydusd -p nydus-image -p e2e
[ -d "$TREE" ] || NYDUS_BIN_DIR=$BIN "$BIN/demo" --only-image

mkdir -p out
scratch=$(mktemp -d -p out bench.XXXXXX)
trap 'rm -rf "$scratch"' EXIT

# seconds COMMAND...: its wall time.
seconds() {
  local began=$EPOCHREALTIME
  "$@"
  awk -v a="$began" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.3f\n", b - a }'
}

# median FILE: of the numbers in it, one a line.
median() {
  sort -n "$1" | awk '{ v[NR] = $1 } END { print NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'
}

# ratio A B: A divided by B.
ratio() {
  awk -v a="$1" -v b="$2" 'BEGIN { printf "%.2f\n", a / b }'
}
