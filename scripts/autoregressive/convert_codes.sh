#!/usr/bin/env bash
# Converts a code store between the packed and the published layout; see docs/code-store.md, or --help.
set -euo pipefail
NNODES=1 NPROC_PER_NODE=1 exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../launch.sh" dataset.convert_codes "$@"
