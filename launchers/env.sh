# shellcheck shell=bash
# Shared by the launchers: where things lie, the environment of a run, running a part and timing it.
# Source it; it changes nothing on disk.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${LANDER_VENV:-$ROOT/.venv}"
VENV_PYTHON="$VENV/bin/python"
SELF="$(basename "$0")"

say() { printf '%s: %s\n' "$SELF" "$*"; }

# die MESSAGE [EXIT_CODE]
die() {
    printf '%s: error: %s\n' "$SELF" "$1" >&2
    exit "${2:-1}"
}

cores() { nproc 2>/dev/null || getconf _NPROCESSORS_ONLN; }

gpus() { { nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l; }

# export_environment RANKS: what every process of a run sees, with RANKS ranks on this machine. A value the user has
# set stays.
export_environment() {
    local threads=$(($(cores) / $1))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
    export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
    export TRANSFORMERS_VERBOSITY="${TRANSFORMERS_VERBOSITY:-error}"
    # The launcher starts python and ninja by name.
    export PATH="$VENV/bin:$PATH"
}

# export_loopback: all ranks are on this machine. Gloo otherwise takes the address that the host name resolves to, and
# in containers that is often none or the wrong one.
export_loopback() {
    if [[ -e /sys/class/net/lo ]]; then
        export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
    fi
}

free_port() {
    "$VENV_PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

PART_GROUP=""
PARTS=()

stop_part() {
    trap '' INT TERM HUP
    if [[ -n "$PART_GROUP" ]]; then
        say "stopping" >&2
        kill -TERM -- "-$PART_GROUP" 2>/dev/null || true
        for _ in {1..100}; do
            kill -0 -- "-$PART_GROUP" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL -- "-$PART_GROUP" 2>/dev/null || true
    fi
    exit "$1"
}
trap 'stop_part 130' INT
trap 'stop_part 143' TERM
trap 'stop_part 129' HUP

# run_part NAME COMMAND...: run it, remember its wall time in PARTS as NAME=SECONDS; on failure end with its exit code.
# The command gets a process group of its own (set -m), so that a signal to this script stops all that it started.
run_part() {
    local name="$1" start="$SECONDS" code=0
    shift
    printf '\n%s: == %s ==\n' "$SELF" "$name"
    set -m
    "$@" </dev/null &
    PART_GROUP=$!
    set +m
    wait "$PART_GROUP" || code=$?
    PART_GROUP=""
    PARTS+=("$name=$((SECONDS - start))")
    if ((code != 0)); then
        die "$name failed with exit code $code after $((SECONDS - start)) s" "$code"
    fi
}
