#!/usr/bin/env bash
# Installs what is needed into .venv and runs the tests. See --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

usage() {
    cat <<EOF
usage: launchers/test.sh [--help] [pytest arguments]

Installs the package with its development requirements into .venv (skipped when up to date) and runs pytest on
tests/ without network. Everything on the command line goes to pytest:

  launchers/test.sh --all                 the long tests too: whole programs of benchmarks/, unbabel-comet itself
  launchers/test.sh tests/data -k tmx
  launchers/test.sh -m "not distributed"
EOF
}

for argument in "$@"; do
    case "$argument" in
        --help | -h) usage; exit 0 ;;
    esac
done

# One more than cores, because ranks and hosts wait for each other.
workers="$(($(cores) + 1))"
workers=$((workers > 8 ? 8 : workers))
say "1. install requirements-dev.txt into .venv (first time: some minutes, several hundred MB or more)"
say "2. run pytest with $workers worker processes"

# Tests start up to four ranks each: one thread per process.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Or every process that a test starts compiles this package again.
unset PYTHONDONTWRITEBYTECODE
export_environment 1
export_loopback
cd "$ROOT"
run_part "install" "$ROOT/launchers/setup.sh" --dev
# Tests that share fixtures stay on one worker: tests/conftest.py says which.
run_part "tests" "$VENV_PYTHON" -m pytest -q -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
