#!/usr/bin/env bash
# From raw text to a model that answers, on any machine: see examples/quickstart.py for what it does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. examples/environment.sh
exec python examples/quickstart.py "$@"
