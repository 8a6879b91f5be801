#!/usr/bin/env bash
# Several ranks on this machine. See --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$ROOT/launchers/cluster.sh"

usage() {
    cat <<EOF
usage: launchers/single.sh [options] STAGE --recipe FILE [lander options]

Runs a stage, or all, on ranks of this machine with DeepSpeed's launcher.

  --ranks N             how many (default: one per GPU, 2 without a GPU)
$COMMON_USAGE
EOF
}

found_gpus="$(gpus)"
RANKS=$((found_gpus > 0 ? found_gpus : 2))
read_arguments "ranks" "$@"
((RANKS > 0)) || die "--ranks 0: must be a positive whole number" 2
export_environment "$RANKS"
export_loopback
open_launch
launch deepspeed --quiet --num_gpus "$RANKS" --master_port "$MASTER_PORT" --no_python --no_local_rank \
    "$ROOT/launchers/rank.sh" "$LAUNCH"
