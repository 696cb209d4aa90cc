#!/usr/bin/env bash
# Formatting, lint, types, and who imports whom.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ruff format --check --quiet . || { echo "error: run 'ruff format .'" >&2; exit 1; }
ruff check --quiet .
mypy
python -m pytest --quiet tests/test_imports.py
