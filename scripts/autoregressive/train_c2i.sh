#!/usr/bin/env bash
# Trains a GPT on image codes; see README.md, or --help. torchrun restarts workers that die, and the run goes
# on from its last checkpoint.
set -euo pipefail
export DEFAULT_RESTARTS=3
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../launch.sh" autoregressive.train.train_c2i "$@"
