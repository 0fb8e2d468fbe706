#!/usr/bin/env bash
# Lint and the whole test suite, a process a core; makes its own .venv on first use.
#   bash scripts/test.sh [PYTEST ARGUMENTS…]        PYTHON=/path/to/python names a prepared interpreter
set -euo pipefail
cd "$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"
source scripts/setup.sh
setup_python requirements-dev.txt 8
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
