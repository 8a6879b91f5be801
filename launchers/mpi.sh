# shellcheck shell=bash disable=SC2034
# What openmpi.sh and mpirun.sh tell Open MPI. Source it after cluster.sh.

MPI_USAGE="\
  --interface NAME      network of the ranks: an interface (eth0, ib0) or a subnet (10.1.0.0/16)
                        (default: the subnet that leads to the first host)"

MPI_OPTIONS=()

# mpi_options: fills MPI_OPTIONS.
mpi_options() {
    local network="$INTERFACE"
    if [[ -z "$network" ]]; then
        network="$("$VENV_PYTHON" "$ROOT/launchers/network.py" "${HOSTS[0]}")" || exit
    fi
    MPI_OPTIONS=(
        # Left alone, DeepSpeed says eth0; mpirun tries bridges and tunnels that lead nowhere.
        --mca btl_tcp_if_include "$network" --mca oob_tcp_if_include "$network"
        --mca plm_rsh_args "$(ssh_options)"
        # Its daemons are known as the launch's: on a host that is cut off they would stay for ever.
        --mca orte_launch_agent "env LANDER_LAUNCH=$LAUNCH orted"
        # Open MPI would tie each rank to one core.
        --bind-to none
    )
    if ((EUID == 0)); then MPI_OPTIONS+=(--allow-run-as-root); fi
}
