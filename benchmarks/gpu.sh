#!/usr/bin/env bash
# benchmarks/gpu.sh [--dry]        all that a GPU has to show, within nine minutes: tests, figures, meta-training
# benchmarks/gpu.sh train [--dry]  nothing but meta-training
#
# It needs a CUDA device, and Python with PyTorch, timm, scikit-image and pytest; benchmarks/gpu_prepare.sh fills .gpu with
# the rest beforehand. Results go into the folder that OUT names (default: gpu-results), as soon as they are known: a run
# that is cut off leaves what is usable.
#
#   gpu.md gpu.json     the table
#   log.txt             what tests and training printed
#   profile.txt         where the time of a training goes, on the CPU and on the GPU
#   head.safetensors    the meta-trained head, every minute
#   checkpoint.*        the state of the meta-training, in parts of 15 MB
#
# Meta-training goes on from the parts of a checkpoint in .gpu/checkpoint; without them it starts from
# .gpu/head.safetensors, and without that from the packaged head. PREPARED names another folder than .gpu.
#
# --dry does the same with tiny sizes on a CPU, in under two minutes. MINUTES (default 9) is how long the whole may take.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

what=all; dry=()
for argument in "$@"; do
    case $argument in
        train) what=train ;;
        --dry) dry=(--dry) ;;
        *) echo "gpu: say benchmarks/gpu.sh [train] [--dry]" >&2; exit 2 ;;
    esac
done
until=$(($(date +%s) + 60 * ${MINUTES:-9}))
out=${OUT:-gpu-results}
prepared=${PREPARED:-.gpu}
mkdir -p "$out"

python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then
    python=.venv/bin/python
elif compgen -G "$prepared/wheels/*.whl" >/dev/null; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$prepared"/wheels/*.whl || exit 1
    export PYTHONPATH=$site
fi
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

if [[ $what == all ]]; then
    if [[ ${#dry[@]} -gt 0 ]]; then
        tests=(-m "cuda and not slow" --device cpu)
    else
        tests=(-m cuda --device cuda)
    fi
    timeout 150 "$python" -m pytest tests/core/test_cuda.py -q --maxfail=8 --no-header --durations=5 "${tests[@]}" 2>&1 |
        tee "$out/log.txt"
    tested=${PIPESTATUS[0]}
    "$python" benchmarks/gpu.py note "$out" tests "$(tail -n 1 "$out/log.txt")"
    "$python" benchmarks/gpu.py table "$out" --until "$((until - 120))" "${dry[@]}" 2>&1 | tee -a "$out/log.txt"
    measured=${PIPESTATUS[0]}
else
    tested=0 measured=0
fi
"$python" benchmarks/gpu.py train "$out" --until "$((until - 10))" "${dry[@]}" 2>&1 | tee -a "$out/log.txt"
trained=${PIPESTATUS[0]}
cat "$out/gpu.md"
exit $((tested || measured || trained))
