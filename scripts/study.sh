#!/usr/bin/env bash
# Compares training recipes in a declared study: arms, seeds, scores with their intervals; see docs/evidence.md, or --help.
#   bash scripts/study.sh scripts/studies/digits.toml
# The same command continues a study, and in several terminals or as Slurm tasks shares its runs; a run takes one thread
# unless OMP_NUM_THREADS says otherwise. Makes its own .venv on first use; PYTHON names a prepared interpreter.
set -euo pipefail
scripts=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
source "$scripts/setup.sh"
setup_python requirements-study.txt 5
export PYTHON
NNODES=1 NPROC_PER_NODE=1 MAX_RESTARTS=0 exec bash "$scripts/launch.sh" scripts.study.main "$@"
