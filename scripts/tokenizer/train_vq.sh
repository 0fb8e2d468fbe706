#!/usr/bin/env bash
# Trains a VQ tokenizer on a folder of images; see docs/own-data.md, or --help. torchrun restarts dead
# workers, and the run goes on from its last checkpoint.
set -euo pipefail
export DEFAULT_RESTARTS=3
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../launch.sh" tokenizer.tokenizer_image.vq_train "$@"
