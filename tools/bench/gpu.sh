#!/usr/bin/env bash
# Builds, tests and measures the kernels on a machine with a GPU, and writes the table; `ranks` trains with several ranks
# on one GPU. Needs the repository, PyTorch and nvcc; no package registry: missing Python packages are installed from a
# folder of wheels.
#   bash tools/bench/gpu.sh [--wheels DIR] [--results DIR] [--into FILE] [--commit HASH] [--nccl FILE]
#       [build|tests|ranks|kernels|step|table ...]
# Default: all stages but `ranks`, in about 20 minutes; each takes less than 10. A stage that fails does not stop the others.
#   --wheels   pip download --dest DIR --only-binary :all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#                  pydantic orjson      (for a machine with Python 3.12 that lacks these two)
#   --results  folder for kernels.json, step-bf16.json and step-fp8.json (default: runs/gpu)
#   --into     document with the table to write (default: docs/measurements.md)
#   --commit   commit that is measured, if git is not available
#   --nccl     a libnccl.so.2 of NCCL 2.30 or newer, for the stage `ranks`: tools/bench/README.md says where to get it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() {
    sed -n '/^# Builds/,/^#   --nccl/s/^# \{0,1\}//p' tools/bench/gpu.sh
    exit "$1"
}

wheels='' nccl='' results=runs/gpu into=docs/measurements.md commit=() stages=()
while [ $# -gt 0 ]; do
    case $1 in
        --wheels | --results | --into | --commit | --nccl)
            [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 64; }
            case $1 in
                --wheels) wheels=$2 ;;
                --results) results=$2 ;;
                --into) into=$2 ;;
                --commit) commit=(--commit "$2") ;;
                --nccl) nccl=$2 ;;
            esac
            shift 2 ;;
        build | tests | ranks | kernels | step | table) stages+=("$1"); shift ;;
        -h | --help) usage 0 ;;
        *) echo "error: $1: expected build, tests, ranks, kernels, step or table" >&2; usage 64 >&2 ;;
    esac
done
[ ${#stages[@]} -gt 0 ] || stages=(build tests kernels step table)

python=python3
if [ -n "${VIRTUAL_ENV:-}" ]; then python=$VIRTUAL_ENV/bin/python; fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # the package is not installed; only the library is built, in engine/

build() {
    if [ -n "$wheels" ]; then
        "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps "$wheels"/*.whl || return 1
    fi
    "$python" -c 'import engine.train.run, engine.testing.runs, pytest' || {
        echo "error: a package of pyproject.toml is missing; install it, or name a folder of wheels with --wheels" >&2
        return 1
    }
    TRIAXIS_CUDA=on "$python" setup.py --quiet build_ext --inplace && "$python" -m engine env
}
tests() {
    "$python" -m pytest tests/gpu --ignore tests/gpu/test_ranks.py -q -rs -p no:cacheprovider --durations=10
}
ranks() {  # over NCCL where one that can is given, otherwise through the host
    local backend=staged failed=0
    if [ -n "$nccl" ]; then
        [ -f "$nccl" ] || { echo "error: --nccl $nccl: no such file" >&2; return 1; }
        backend=nccl
        local -x LD_PRELOAD=$nccl
    fi
    "$python" tools/bench/ranks.py --backend "$backend" || failed=1
    "$python" -m pytest tests/gpu/test_ranks.py -q -rs -p no:cacheprovider --durations=30 || failed=1
    return $failed
}
kernels() { "$python" tools/bench/kernels.py --json "$results/kernels.json" "${commit[@]}"; }
step() {
    # with fp32 moments, the FP8 weights do not fit into an H200 in addition to the other 120 GiB
    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
    local measure=("$python" tools/bench/step.py --preset llama2-7b "${commit[@]}") failed=0
    "${measure[@]}" --precision bf16 --json "$results/step-bf16.json" || failed=1
    "${measure[@]}" --precision fp8 --json "$results/step-fp8.json" --optimizer.moments bf16 || failed=1
    return $failed
}
table() {
    local found=()
    for file in "$results"/*.json; do [ ! -e "$file" ] || found+=("$file"); done
    "$python" tools/bench/kernels.py --results "${found[@]}" --into "$into"
}

mkdir -p "$results"
failed=()
for stage in "${stages[@]}"; do
    echo "== $stage"
    SECONDS=0
    "$stage" || failed+=("$stage")
    echo "== $stage took $SECONDS s"
    case " ${failed[*]-} " in *' build '*) break ;; esac
done
[ ${#failed[@]} -eq 0 ] || { echo "error: failed: ${failed[*]}" >&2; exit 1; }
