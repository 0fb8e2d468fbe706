#!/usr/bin/env bash
# Turns a folder of images into codes, once; see docs/code-store.md, or --help. The same command continues what was
# interrupted; torchrun restarts dead workers, and nothing is done twice.
set -euo pipefail
export DEFAULT_RESTARTS=3
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../launch.sh" autoregressive.train.extract_codes_c2i "$@"
