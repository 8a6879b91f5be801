#!/usr/bin/env bash
# What each rank runs, whichever launcher starts it: it sets this host's environment and runs lander_ds.
#   launchers/rank.sh LAUNCH_DIR                    made by open_launch of cluster.sh, which has written what to run
#   launchers/rank.sh - STAGE --recipe FILE ...     where nothing watches the ranks (Kubernetes)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

launch="${1:?LAUNCH_DIR is missing}"
shift
export LANDER_LAUNCH="$launch"

# Under srun; DeepSpeed's launcher and torchrun set RANK, under mpirun lander_ds finds it through mpi4py.
if [[ -z "${RANK:-}${OMPI_COMM_WORLD_RANK:-}${PMI_RANK:-}" && -n "${SLURM_PROCID:-}" ]]; then
    export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="${SLURM_STEP_NUM_TASKS:-$SLURM_NTASKS}"
fi
rank="${RANK:-${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-0}}}"
# SLURM writes 4, or 4(x2) for two hosts.
local_ranks="${LOCAL_WORLD_SIZE:-${LOCAL_SIZE:-${OMPI_COMM_WORLD_LOCAL_SIZE:-${SLURM_STEP_TASKS_PER_NODE:-1}}}}"

arguments=("$@")
if [[ "$launch" != - ]]; then
    [[ -f "$launch/environment" ]] || die "$(hostname): $launch is missing: run_dir must be shared by all hosts" 2
    port="${MASTER_PORT:-}" venv="${LANDER_VENV:-}"
    # shellcheck source=/dev/null
    source "$launch/environment"
    # What the launcher or this host has set counts more.
    export MASTER_PORT="${port:-$MASTER_PORT}"
    VENV="${venv:-${LANDER_VENV:-$VENV}}"
    VENV_PYTHON="$VENV/bin/python"
    mapfile -d '' -t arguments <"$launch/arguments"
fi
export LOCAL_WORLD_SIZE="${local_ranks%%[^0-9]*}"
export_environment "$LOCAL_WORLD_SIZE"
[[ -x "$VENV_PYTHON" ]] || die "$(hostname): $VENV_PYTHON is missing: run launchers/setup.sh on every host" 2

command=("$VENV_PYTHON" -u -m lander_ds "${arguments[@]}")
if [[ "$launch" == - ]]; then exec "${command[@]}"; fi
exec "$VENV_PYTHON" "$ROOT/launchers/rank.py" "$launch" "$rank" "${command[@]}"
