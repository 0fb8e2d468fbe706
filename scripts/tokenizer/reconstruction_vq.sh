#!/usr/bin/env bash
# Reconstructs a folder of images with a VQ tokenizer: PSNR, SSIM, LPIPS, and the .npz for rFID; see --help.
set -euo pipefail
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../launch.sh" tokenizer.tokenizer_image.reconstruct "$@"
