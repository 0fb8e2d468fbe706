#!/usr/bin/env bash
# Converts weights between checkpoints (.pt) and the form of the Hugging Face hub; see docs/hub.md, or --help.
set -euo pipefail
NNODES=1 NPROC_PER_NODE=1 exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh" autoregressive.export "$@"
