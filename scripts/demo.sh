#!/usr/bin/env bash
# A page in the browser that draws pictures while you watch, and edits them; see docs/demo.md, or --help.
#   bash scripts/demo.sh [--pretrained npp/c2i_B_256.pt]
# Makes its own .venv on first use; PYTHON names a prepared interpreter.
set -euo pipefail
scripts=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
source "$scripts/setup.sh"
setup_python requirements-demo.txt 5
export PYTHON
NNODES=1 NPROC_PER_NODE=1 MAX_RESTARTS=0 exec bash "$scripts/launch.sh" autoregressive.demo.main "$@"
