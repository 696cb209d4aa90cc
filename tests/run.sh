#!/usr/bin/env bash
# Everything that must hold: formatting, types, import directions, and all tests. Needs only Python and its registry.
#   bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. examples/environment.sh
export OMP_NUM_THREADS=1  # tests run side by side, with several ranks each
bash tests/lint.sh
exec python -m pytest -n 2 "$@"
