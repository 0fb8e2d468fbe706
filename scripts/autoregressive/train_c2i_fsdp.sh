#!/usr/bin/env bash
# train_c2i.sh with the weights, gradients and optimizer sharded over all processes.
set -euo pipefail
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/train_c2i.sh" --parallel fsdp "$@"
