#!/usr/bin/env bash
# Checks a code store and draws random images beside their decoded codes; see docs/code-store.md, or --help.
set -euo pipefail
NNODES=1 NPROC_PER_NODE=1 exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../launch.sh" autoregressive.train.verify_codes "$@"
