#!/usr/bin/env bash
set -euo pipefail
NNODES=1 NPROC_PER_NODE=1 exec bash "$(dirname "${BASH_SOURCE[0]}")/../launch.sh" dataset.convert_codes "$@"
