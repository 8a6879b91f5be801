#!/usr/bin/env bash
# Makes the environment that neural metrics run in. See --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# The version whose scores the tests compare with.
PACKAGE="unbabel-comet==2.2.7"

usage() {
    cat <<EOF
usage: launchers/comet_env.sh [--help] [DIRECTORY]

Makes a virtual environment with $PACKAGE in DIRECTORY (default: .venv-comet in the repository), for the neural
metrics of a recipe (score.neural). That package wants older versions of transformers and NumPy than this project;
PyTorch, and whatever else suits both, is shared with .venv. Does nothing when that has been done.

A recipe finds it by score.neural.NAME.python or by LANDER_COMET_PYTHON: DIRECTORY/bin/python.
EOF
}

directory="$ROOT/.venv-comet"
while (($#)); do
    case "$1" in
        --help | -h) usage; exit 0 ;;
        -*) usage >&2; die "unknown argument: $1" 2 ;;
        *) directory="$1" ;;
    esac
    shift
done

python="$directory/bin/python"
if "$python" -c 'import comet' 2>/dev/null; then
    say "$directory is up to date"
    exit 0
fi
[[ -x "$VENV_PYTHON" ]] || die "there is no $VENV: run launchers/setup.sh first"
say "installing $PACKAGE into $directory"
site_packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
"$VENV_PYTHON" -m venv --clear "$directory"
# Read after the environment's own packages. pip counts what suits as installed, and leaves alone what does not.
site_packages "$VENV_PYTHON" >"$(site_packages "$python")/shared.pth"
# Later versions of setuptools lack pkg_resources, and of sentencepiece want a newer protobuf than the package does.
"$python" -m pip install --quiet --disable-pip-version-check --no-warn-conflicts \
    "$PACKAGE" "setuptools<81" "sentencepiece==0.2.0"
"$python" -W ignore -c 'import comet'
say "LANDER_COMET_PYTHON=$python"
