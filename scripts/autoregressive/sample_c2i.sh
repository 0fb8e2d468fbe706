#!/usr/bin/env bash
# Samples 50,000 images for FID into one .npz; docs/sampling.md.
set -euo pipefail
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../launch.sh" autoregressive.sample.sample_c2i_ddp "$@"
