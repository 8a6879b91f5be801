#!/usr/bin/env bash
# Ranks on the hosts of a hostfile through DeepSpeed's launcher and Open MPI. See --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$ROOT/launchers/cluster.sh"
source "$ROOT/launchers/mpi.sh"

usage() {
    cat <<EOF
usage: launchers/openmpi.sh --hostfile FILE [options] STAGE --recipe FILE [lander options]

Runs a stage, or all, on several hosts: "deepspeed --hostfile FILE --launcher openmpi". Needs Open MPI on every host,
and this directory and its .venv under the same path. The ranks find one another through mpi4py.

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
launch deepspeed --quiet --hostfile "$HOSTFILE" --launcher openmpi --force_multi \
    ${SSH_PORT:+--ssh_port "$SSH_PORT"} "--launcher_args=$(printf '%q ' "${MPI_OPTIONS[@]}")" \
    --no_python "$ROOT/launchers/rank.sh" "$LAUNCH"
