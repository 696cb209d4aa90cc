#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, in stages of at most 3 minutes: tools/bench/README.md, --help.
#   bash tools/bench/gpu.sh --make-bundle DIR      # elsewhere: all that a bare machine with PyTorch lacks
#   bash tools/bench/gpu.sh --bundle DIR           # on the machine, which needs no package registry and no nvcc
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=python3
if [ -n "${VIRTUAL_ENV:-}" ]; then python=$VIRTUAL_ENV/bin/python; fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # the package is not installed; only the library is built, in engine/

if [ "${1:-}" = --make-bundle ]; then
    shift
    exec "$python" -m tools.bench.gpu.bundle "$@"
fi
exec "$python" -m tools.bench.gpu "$@"
