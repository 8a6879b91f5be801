#!/usr/bin/env bash
# Ranks on the hosts of a hostfile through Open MPI's mpirun alone. See --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$ROOT/launchers/cluster.sh"
source "$ROOT/launchers/mpi.sh"

usage() {
    cat <<EOF
usage: launchers/mpirun.sh --hostfile FILE [options] STAGE --recipe FILE [lander options]

Runs a stage, or all, on several hosts with plain mpirun, where a site has tuned it or has no DeepSpeed launcher. Needs
Open MPI on every host, and this directory under the same path. The ranks find one another through mpi4py.

$HOSTFILE_USAGE
$MPI_USAGE
$COMMON_USAGE
EOF
}

read_arguments "hostfile ssh-port interface" "$@"
read_hostfile
need mpirun openmpi-bin
need ssh openssh-client
open_launch
mpi_options
launch mpirun -n "$RANKS" --hostfile "$HOSTFILE" "${MPI_OPTIONS[@]}" -x LANDER_LAUNCH \
    "$ROOT/launchers/rank.sh" "$LAUNCH"
