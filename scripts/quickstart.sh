#!/usr/bin/env bash
# The whole pipeline on real images in minutes, on two CPU cores: tokenizer, codes, GPT, samples, scores.
#   bash scripts/quickstart.sh [FOLDER]       default: quickstart/ in this checkout; the same command continues a run
# Makes its own .venv on first use; PYTHON=/path/to/python names a prepared interpreter.
set -euo pipefail
root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
out=${1:-$root/quickstart}
mkdir -p "$out"
out=$(readlink -f "$out")
cd "$root"
source scripts/setup.sh
setup_python requirements-quickstart.txt 6
: >"$out/steps.tsv"
unset PYTHONOPTIMIZE
export PYTHON PYTHONPATH=$root NNODES=1 NPROC_PER_NODE=${NPROC_PER_NODE:-1}

step() { # step NAME COMMAND…: show the command, run it, note its seconds
    local name=$1 started=$SECONDS
    shift
    printf '\n\033[1m== %s\033[0m\n$ %s\n' "$name" "$*"
    "$@" || {
        status=$?
        echo "quickstart: the step '$name' failed; after mending it, the same command continues." >&2
        exit "$status"
    }
    printf '%s\t%d\n' "$name" $((SECONDS - started)) >>"$out/steps.tsv"
}

digits=$out/digits
vq=(--vq-model VQ-Tiny --vq-ckpt "$out/tokenizer/digits/checkpoints/last.pt" --codebook-size 256)
gpt=(--gpt-model GPT-Tiny --image-size 32 --downsample-size 4 --num-classes 10)
codes=("${vq[@]}" --dataset digits --image-size 32 --ten-crop --crop-range 1.1 --no-mirror)

step "data" "$PYTHON" -m dataset.embedded digits --output "$digits"
step "classifier" "$PYTHON" -m evaluations.c2i.train_classifier --data-path "$digits/train" --val-data-path "$digits/test" \
    --image-size 32 --output "$out/classifier.pt2"
step "tokenizer" bash scripts/tokenizer/train_vq.sh --data-path "$digits/train" --results-dir "$out/tokenizer" \
    --run-name digits --vq-model VQ-Tiny --codebook-size 256 --image-size 32 --no-mirror --perceptual-weight 0 \
    --disc-weight 0 --revive-dead-codes 20 --epochs 7 --global-batch-size 32 --lr 2e-3 --scheduler --warmup-epochs 0.5 \
    --decay-ratio 0.4 --end-lr 1e-4 --mixed-precision none --log-every 45
step "reconstruction" bash scripts/tokenizer/reconstruction_vq.sh --data-path "$digits/test" "${vq[@]}" --image-size 32 \
    --sample-dir "$out/reconstructions" --name held-out
step "reference" bash scripts/tokenizer/reconstruction_vq.sh --data-path "$digits/train" "${vq[@]}" --image-size 32 \
    --sample-dir "$out/reconstructions" --name train --save-originals
step "codes" bash scripts/autoregressive/extract_codes_c2i.sh --data-path "$digits/train" --code-path "$out/codes" "${codes[@]}"
step "held-out codes" bash scripts/autoregressive/extract_codes_c2i.sh --data-path "$digits/test" \
    --code-path "$out/held_out_codes" "${codes[@]}"
step "verify" bash scripts/autoregressive/verify_codes.sh --codes "$out/codes/digits32_codes" --data-path "$digits/train" \
    --vq-ckpt "$out/tokenizer/digits/checkpoints/last.pt" --output "$out/codes.png"
step "training" bash scripts/autoregressive/train_c2i.sh --code-path "$out/codes" --val-code-path "$out/held_out_codes" \
    --val-every 810 --dataset digits "${gpt[@]}" --vocab-size 256 --results-dir "$out/gpt" --run-name digits \
    --epochs 72 --epoch-rate 0.5 --patch-level 2 --scheduler --global-batch-size 32 --lr 2e-3 --end-lr 1e-4 \
    --mixed-precision none --log-every 45
step "sampling" bash scripts/autoregressive/sample_c2i.sh "${vq[@]}" --gpt-ckpt "$out/gpt/digits/checkpoints/last.pt" \
    "${gpt[@]}" --image-size-eval 32 --cfg-scale 2.0 --num-fid-samples 1000 --per-proc-batch-size 100 \
    --sample-dir "$out/samples"
samples=$out/samples/GPT-Tiny-last-size-32-size-32-VQ-Tiny-topk-0-topp-1.0-temperature-1.0-cfg-2.0-seed-0.npz
step "evaluation" bash scripts/evaluate.sh "$out/reconstructions/train-originals.npz" "$samples" \
    --features "$out/classifier.pt2" --report "$out/evaluation"
"$PYTHON" -m scripts.quickstart_report "$out" "$samples"
