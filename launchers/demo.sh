#!/usr/bin/env bash
# The whole job on the sample corpora: install, get the base model, run every stage under deepspeed. See --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

usage() {
    cat <<EOF
usage: launchers/demo.sh [--ranks N] [--recipe FILE] [--set KEY=VALUE]... [--force] [--help]

Installs what is needed into .venv, gets the recipe's base model, and runs every stage of the recipe with
"deepspeed --num_gpus N --module lander_ds all". What is up to date is skipped: run it again after an interruption.

  --ranks N        processes to run the stages with (default: one per GPU, 2 without a GPU)
  --recipe FILE    default: recipes/demo.yaml
  --set KEY=VALUE  override a value of the recipe, e.g. --set train.steps=20; may be repeated
  --force          run the stages even when they are up to date
  --help           show this text
EOF
}

found_gpus="$(gpus)"
ranks=$((found_gpus > 0 ? found_gpus : 2))
recipe="$ROOT/recipes/demo.yaml"
overrides=()
force=()
while (($#)); do
    case "$1" in
        --ranks | --recipe | --set)
            (($# > 1)) || { usage >&2; die "$1 needs a value" 2; }
            case "$1" in
                --ranks) ranks="$2" ;;
                --recipe) recipe="$(realpath "$2")" ;;
                --set) overrides+=("$2") ;;
            esac
            shift
            ;;
        --force) force=(--force) ;;
        --help | -h) usage; exit 0 ;;
        *) usage >&2; die "unknown argument: $1" 2 ;;
    esac
    shift
done
[[ "$ranks" =~ ^[1-9][0-9]*$ ]] || die "--ranks $ranks: must be a positive whole number" 2
[[ -f "$recipe" ]] || die "--recipe $recipe: no such file" 2

cd "$ROOT"
recipe="${recipe#"$ROOT"/}"
cat <<EOF
$SELF: this will
  1. install Python packages into .venv (download: about 0.5 GB with a CPU build of torch, several GB with CUDA)
  2. get the base model into models/ (Gemma 3 270M: 238 MB download, 570 MB on disk, 1.1 GB while it is converted).
     By using it you accept the Gemma Terms of Use: https://ai.google.dev/gemma/terms
  3. run the stages prepare, detect, select, train, translate, score, export, report of $recipe
     on $ranks ranks and print the scores
Steps that are up to date are skipped. On two idle CPU cores the first run is meant to take at most half an hour.
Nothing is written outside this directory, except pip's and torch's caches.
EOF

# Such a processor imitates bfloat16, which would take hours. What --set says comes later, and so wins.
if ((found_gpus == 0)) && grep -qw avx2 /proc/cpuinfo 2>/dev/null && ! grep -qw avx512f /proc/cpuinfo; then
    say "this processor has no bfloat16 arithmetic: model.dtype=float32"
    overrides=(model.dtype=float32 ${overrides[@]+"${overrides[@]}"})
fi

export_environment "$ranks"
export_loopback
# Tables in a log file need not fit the 80 columns of a terminal that is not there.
[[ -t 1 ]] || export COLUMNS="${COLUMNS:-120}"
run_part "install" "$ROOT/launchers/setup.sh"

# Only read, not checked: the base model may not be there yet.
paths="$("$VENV_PYTHON" launchers/recipe_paths.py --recipe "$recipe" "${overrides[@]/#/--set=}")"
{ read -r model && read -r run_dir; } <<<"$paths"

case "$(basename "$model")" in
    gemma3-270m | smollm2-135m)
        run_part "model" "$VENV_PYTHON" examples/demo_model.py --model "$(basename "$model")" "$model"
        ;;
    *) [[ -d "$model" ]] || die "$recipe: model.path: $model is not a directory" 2 ;;
esac

port="$(free_port)"
# DeepSpeed's shared-memory buffers outlive their run; their names end in the port, which was this run's alone.
trap 'rm -f "/dev/shm/deepspeed_allreduce_buffer_$(id -u)_127.0.0.1_${port}_"*' EXIT
stages_started="$(date +%s)"
run_part "stages" deepspeed --quiet --num_gpus "$ranks" --master_port "$port" --module lander_ds all \
    --recipe "$recipe" "${overrides[@]/#/--set=}" "${force[@]}"
# The launcher also ends with 0 when it was itself killed.
[[ -f "$run_dir/stages/report.json" ]] || die "the stages ended early: $run_dir/stages/report.json is missing"

printf '\n'
"$VENV_PYTHON" -m lander_ds summary "$run_dir"
printf '\n'
"$VENV_PYTHON" launchers/timing.py "$run_dir" --ranks "$ranks" --stages-started "$stages_started" "${PARTS[@]}"
printf '\n%s: written under %s:\n' "$SELF" "$run_dir"
for name in awareness.safetensors selection.safetensors checkpoints export scores.json metrics.jsonl report.html \
    timing.json; do
    if [[ -e "$run_dir/$name" ]]; then printf '  %s\n' "$run_dir/$name"; fi
done
