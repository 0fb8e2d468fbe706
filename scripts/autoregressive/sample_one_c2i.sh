#!/usr/bin/env bash
# Samples one picture of chosen classes; docs/sampling.md.
set -euo pipefail
NNODES=1 NPROC_PER_NODE=1 exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../launch.sh" autoregressive.sample.sample_c2i "$@"
