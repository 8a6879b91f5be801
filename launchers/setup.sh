#!/usr/bin/env bash
# Installs the package and what it needs into .venv. See --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

usage() {
    cat <<EOF
usage: launchers/setup.sh [--dev] [--help]

Creates .venv in the repository (Python 3.11 or newer) and installs requirements.txt and this package (editable)
into it. Does nothing when that has been done for the same requirements.

  --dev    also install what tests and checks need (requirements-dev.txt)
  --help   show this text

PYTHON=/path/to/python3.12 names the interpreter to build .venv with. On Linux without a GPU, PyPI's torch brings
several GB of CUDA libraries along that are never used; to get the smaller CPU build, set
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
EOF
}

requirements=(requirements.txt)
while (($#)); do
    case "$1" in
        --dev) requirements+=(requirements-dev.txt) ;;
        --help | -h) usage; exit 0 ;;
        *) usage >&2; die "unknown argument: $1" 2 ;;
    esac
    shift
done

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The first interpreter that is new enough; its name on standard output.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.11 python3.12 python3.13; do
        if [[ -n "$candidate" ]] && is_new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer found: install one (Debian: apt-get install python3 python3-venv)"
}

create_venv() {
    local base="$1"
    say "creating .venv with $("$base" --version)"
    if "$base" -c 'import ensurepip' 2>/dev/null; then
        "$base" -m venv "$VENV"
    elif "$base" -c 'import venv, pip' 2>/dev/null; then
        # Debian splits ensurepip off into python3-venv; pip can install itself instead.
        "$base" -m venv --without-pip "$VENV"
        "$base" -m pip --python "$VENV_PYTHON" install --disable-pip-version-check pip
    else
        die "$base cannot make virtual environments: install python3-venv (Debian: apt-get install python3-venv)"
    fi
}

# Changes whenever the installation has to be repeated.
fingerprint() { { printf '%s\n' "$ROOT"; "$VENV_PYTHON" --version; cat pyproject.toml "$@"; } | sha256sum; }

stamp() { printf '%s/.installed-%s\n' "$VENV" "$1"; }

is_installed() {
    local name
    [[ -x "$VENV_PYTHON" ]] || return 1
    for name in "${requirements[@]}"; do
        [[ "$(cat "$(stamp "$name")" 2>/dev/null)" == "$(fingerprint "$name")" ]] || return 1
    done
}

cd "$ROOT"
if [[ ! -d "$VENV" ]]; then
    base="$(find_python)"
    create_venv "$base"
fi
if is_installed; then
    say ".venv is up to date"
    exit 0
fi
if ! is_new_enough "$VENV_PYTHON" || ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
    die "$VENV is unfinished, has no pip, or is older than Python 3.11: delete it and start again"
fi
if (($(gpus) == 0)) && [[ "$(uname -s)" == Linux ]]; then
    say "no NVIDIA GPU seen; --help says how to get the smaller CPU build of torch"
fi
command -v c++ >/dev/null || say "no C++ compiler seen; only optimizer offload needs one (Debian: g++)"
say "installing ${requirements[*]} into .venv"
options=()
for name in "${requirements[@]}"; do options+=(--requirement "$name"); done
"$VENV_PYTHON" -m pip install --disable-pip-version-check "${options[@]}"
"$VENV_PYTHON" -m pip install --disable-pip-version-check --no-deps --editable .
for name in "${requirements[@]}"; do fingerprint "$name" >"$(stamp "$name")"; done
say "installed"
