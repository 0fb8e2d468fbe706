#!/usr/bin/env bash
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../launch.sh" autoregressive.train.extract_codes_c2i "$@"
