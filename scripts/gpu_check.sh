#!/usr/bin/env bash
# Proves and measures the GPU paths: tests, benchmarks, benchmarks/results/DEVICE.json and its table in RESULTS.md.
#   bash scripts/gpu_check.sh [--minutes N] [--only "tests,training GPT-L"]
#   bash scripts/gpu_check.sh --device cpu --tiny       every job on a CPU, at tiny sizes
# Needs PyTorch 2.11, NumPy, Pillow, tqdm and pytest, in .venv or in the interpreter that PYTHON names (or python3).
set -euo pipefail
cd "$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
exec "$PYTHON" -m benchmarks.gpu_check "$@"
