# shellcheck shell=bash disable=SC2034
# Shared by single.sh, pdsh.sh, openmpi.sh, mpirun.sh and slurm.sbatch: their arguments, the hostfile, the variables
# that reach every rank, and the launch itself. Source it after env.sh.

# Variables with these prefixes reach every rank on every host; --export NAME adds one.
FORWARDED='^(PYTHON|(NCCL|GLOO|TORCH|OMP|MKL|UCX|FI|MV2|HF|TOKENIZERS|TRANSFORMERS|DS|DEEPSPEED|WANDB|MLFLOW|LANDER)_)'
# They belong to one launch, or to the launcher.
NOT_FORWARDED='^(LANDER_LAUNCH|DS_ENV_FILE|TORCHELASTIC_.*)$'

LEASE_SECONDS="${LANDER_LEASE_SECONDS:-60}"
STOP_SECONDS="${LANDER_STOP_SECONDS:-120}"
RESTART_SECONDS="${LANDER_RESTART_SECONDS:-10}"
for name in LEASE STOP RESTART; do
    value="${name}_SECONDS"
    [[ "${!value}" =~ ^(0|[1-9][0-9]*)$ ]] || die "LANDER_$value=${!value}: must be a whole number of seconds" 2
done
((LEASE_SECONDS > 3)) || die "LANDER_LEASE_SECONDS=$LEASE_SECONDS: a host cannot be heard so often; 4 is the least" 2
HOSTFILE=""
HOSTS=()
RANKS=0
MAX_RESTARTS=0
ATTEMPT=0
MASTER_PORT="${MASTER_PORT:-}"
SSH_PORT=""
INTERFACE=""
EXPORT=()
COMMAND=()
RUN_DIR=""
LAUNCH=""

# The options that all launchers have, for their usage.
COMMON_USAGE="\
  --max-restarts N      start again, from the newest checkpoint, at most N times (default: 0). Not after wrong input
                        (exit code 2), a checkpoint that cannot be written (74) or Ctrl-C
  --master-port PORT    where the ranks meet (default: from this process's number, so that two launches differ)
  --export NAME         also pass this variable to the ranks; may be repeated. Passed anyway: NCCL_*, GLOO_*, TORCH_*,
                        OMP_*, UCX_*, PYTHON*, HF_*, DS_*, WANDB_*, MLFLOW_*, LANDER_*, ... and .deepspeed_env
  --help                show this text

Ctrl-C, SIGTERM and SIGUSR1 ask the ranks to save and stop; after LANDER_STOP_SECONDS (120), or a second Ctrl-C, they
are killed. A host that is silent for LANDER_LEASE_SECONDS (60) counts as lost. Exit codes and all else: docs/cluster.md"

HOSTFILE_USAGE="\
  --hostfile FILE       lines \"node1 slots=8\": hosts and the ranks on each; ssh reaches them without a password
  --ssh-port PORT       where the hosts' sshd listens, if not where ssh's configuration says"

# read_arguments OPTIONS ARGUMENTS...: OPTIONS are the long options with a value that this launcher has beside the
# common ones, separated by spaces. What follows them is the command for lander_ds.
read_arguments() {
    local own=" $1 max-restarts master-port export " name
    shift
    while (($#)); do
        case "$1" in
            --help | -h) usage; exit 0 ;;
            --*)
                name="${1#--}"
                [[ "$own" == *" ${name%%=*} "* ]] || { usage >&2; die "unknown argument: $1" 2; }
                if [[ "$name" == *=* ]]; then
                    set -- "--${name%%=*}" "${name#*=}" "${@:2}"
                    name="${name%%=*}"
                fi
                (($# > 1)) || { usage >&2; die "--$name needs a value" 2; }
                take_option "$name" "$2"
                shift 2
                ;;
            *) break ;;
        esac
    done
    COMMAND=("$@")
    ((${#COMMAND[@]})) || { usage >&2; die "no stage: say what to run, e.g. train --recipe recipes/demo.yaml" 2; }
    MASTER_PORT="${MASTER_PORT:-$((20000 + $$ % 10000))}"
}

take_option() {
    case "$1" in
        hostfile) HOSTFILE="$2" ;;
        interface) INTERFACE="$2" ;;
        export)
            [[ -n "${!2+set}" ]] || die "--export $2: there is no such variable" 2
            EXPORT+=("$2")
            ;;
        *)
            [[ "$2" =~ ^[0-9]+$ ]] || die "--$1 $2: must be a whole number" 2
            case "$1" in
                ranks) RANKS="$2" ;;
                max-restarts) MAX_RESTARTS="$2" ;;
                master-port) MASTER_PORT="$2" ;;
                ssh-port) SSH_PORT="$2" ;;
            esac
            ;;
    esac
}

# read_hostfile: fills HOSTS and RANKS. DeepSpeed only warns where there is no hostfile, and trains on this machine.
# Not by lander_ds/cluster/doctor/hostfile.py: a bad hostfile is refused where there is no environment yet, too, and
# what DeepSpeed passes over in silence is an error here.
read_hostfile() {
    local line number=0 host
    [[ -n "$HOSTFILE" ]] || { usage >&2; die "--hostfile is needed" 2; }
    [[ -f "$HOSTFILE" && -r "$HOSTFILE" ]] || die "--hostfile $HOSTFILE: no such file" 2
    HOSTFILE="$(realpath "$HOSTFILE")"
    while IFS= read -r line || [[ -n "$line" ]]; do
        number=$((number + 1))
        line="${line%%#*}"
        [[ "$line" =~ [^[:space:]] ]] || continue
        [[ "$line" =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]] ||
            die "$HOSTFILE:$number: \"$line\" is not a host and its ranks; write it as: node1 slots=8" 2
        host="${BASH_REMATCH[1]}"
        RANKS=$((RANKS + BASH_REMATCH[2]))
        [[ " ${HOSTS[*]} " != *" $host "* ]] || die "$HOSTFILE:$number: $host stands there twice" 2
        HOSTS+=("$host")
    done <"$HOSTFILE"
    ((RANKS)) || die "$HOSTFILE names no host; write one per line: node1 slots=8" 2
}

need() {
    command -v "$1" >/dev/null || die "$1 is not installed here (Debian: apt-get install $2)" 2
}

# open_launch: makes LAUNCH, a directory in the run's own that every host sees, with the arguments of lander_ds and the
# variables for the ranks. Launchers would quote both wrongly, and lose most of the latter.
open_launch() {
    local paths
    [[ -x "$VENV_PYTHON" ]] || die "$VENV_PYTHON is missing: run launchers/setup.sh on every host, or set LANDER_VENV" 2
    # Refuses a recipe that cannot be read before any host is asked for anything.
    paths="$("$VENV_PYTHON" "$ROOT/launchers/recipe_paths.py" "${COMMAND[@]}")" || exit
    { read -r _ && read -r RUN_DIR; } <<<"$paths"
    LAUNCH="$(realpath -m "$RUN_DIR")/launch/$(hostname)-$$"
    # The shells of other hosts would take other characters for their own.
    if ((${#HOSTS[@]})) && [[ ! "$ROOT$LAUNCH" =~ ^[A-Za-z0-9_./+@%=:,-]+$ ]]; then
        die "$LAUNCH, $ROOT: for several hosts, paths may have letters, digits and _./+@%=:,- only" 2
    fi
    mkdir -p "$LAUNCH"
    printf '%s\0' "${COMMAND[@]}" >"$LAUNCH/arguments"
    (umask 077; write_environment >"$LAUNCH/environment")
    # Read by DeepSpeed in place of the user's .deepspeed_env, of which a blank line or a comment would end it.
    printf 'LANDER_LAUNCH=%s\n' "$LAUNCH" >"$LAUNCH/deepspeed_env"
    export DS_ENV_FILE="$LAUNCH/deepspeed_env"
    export PATH="$VENV/bin:$PATH"
}

write_environment() {
    local name
    for name in "$HOME/.deepspeed_env" .deepspeed_env; do
        if [[ -f "$name" ]]; then write_deepspeed_env "$name"; fi
    done
    while read -r name; do
        if [[ "$name" =~ $FORWARDED && ! "$name" =~ $NOT_FORWARDED ]]; then printf 'export %s=%q\n' "$name" "${!name}"; fi
    done < <(compgen -e)
    for name in "${EXPORT[@]}"; do printf 'export %s=%q\n' "$name" "${!name}"; done
    printf 'export MASTER_PORT=%q\n' "$MASTER_PORT"
}

# write_deepspeed_env FILE: its KEY=VALUE lines.
write_deepspeed_env() {
    local line number=0
    while IFS= read -r line || [[ -n "$line" ]]; do
        number=$((number + 1))
        if [[ "$line" =~ ^[[:space:]]*(#.*)?$ ]]; then continue; fi
        [[ "$line" =~ ^[[:space:]]*([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]] ||
            die "$1:$number: \"$line\" is not KEY=VALUE" 2
        printf 'export %s=%q\n' "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}"
    done <"$1"
}

# Never ask for a password; a cut link would otherwise be noticed after hours.
SSH_OPTIONS=(-oBatchMode=yes -oConnectTimeout=10 "-oServerAliveInterval=$(((LEASE_SECONDS + 3) / 4))" -oServerAliveCountMax=3)

ssh_options() { printf '%s' "${SSH_OPTIONS[*]}${SSH_PORT:+ -p $SSH_PORT}"; }

# launch COMMAND...: run it until it has done its work; takes the place of this script. The command starts
# launchers/rank.sh LAUNCH RANKS times.
launch() {
    exec "$VENV_PYTHON" "$ROOT/launchers/supervise.py" --launch-dir "$LAUNCH" --ranks "$RANKS" \
        --hosts "$(IFS=,; printf '%s' "${HOSTS[*]}")" --ssh "ssh $(ssh_options)" --python "$VENV_PYTHON" \
        --max-restarts "$MAX_RESTARTS" --attempt "$ATTEMPT" --lease-seconds "$LEASE_SECONDS" \
        --stop-seconds "$STOP_SECONDS" --restart-seconds "$RESTART_SECONDS" -- "$@"
}
