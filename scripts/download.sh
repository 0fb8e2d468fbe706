#!/usr/bin/env bash
# Lists the published weights, or downloads those named; see pretrained_models/README.md.
set -euo pipefail
NNODES=1 NPROC_PER_NODE=1 exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh" pretrained_models.download "$@"
