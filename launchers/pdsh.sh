#!/usr/bin/env bash
# Ranks on the hosts of a hostfile through DeepSpeed's launcher, pdsh and ssh. See --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$ROOT/launchers/cluster.sh"

usage() {
    cat <<EOF
usage: launchers/pdsh.sh --hostfile FILE [options] STAGE --recipe FILE [lander options]

Runs a stage, or all, on several hosts: "deepspeed --hostfile FILE --launcher pdsh". Needs pdsh here, and on every
host this directory and its .venv (its own or a shared one) under the same path.

$HOSTFILE_USAGE
$COMMON_USAGE
EOF
}

read_arguments "hostfile ssh-port" "$@"
read_hostfile
need pdsh pdsh
need ssh openssh-client
open_launch
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} ${SSH_OPTIONS[*]}"
# Forced, or a hostfile with one host would be ignored in favour of this machine.
launch deepspeed --quiet --hostfile "$HOSTFILE" --launcher pdsh --force_multi ${SSH_PORT:+--ssh_port "$SSH_PORT"} \
    --master_port "$MASTER_PORT" --no_python --no_local_rank "$ROOT/launchers/rank.sh" "$LAUNCH"
