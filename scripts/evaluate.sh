#!/usr/bin/env bash
# FID, sFID, Inception Score, Precision and Recall of generated images; see evaluations/c2i/README.md, or --help.
set -euo pipefail
NNODES=1 NPROC_PER_NODE=1 exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh" evaluations.c2i.evaluator "$@"
