#!/bin/bash
# Trains the demo's base model, examples/demo/base: a Llama of 0.6 million parameters from scratch, with 512 tokens of context. Takes about
# ten minutes on two cores. Retrieval is learned at 64 tokens first, in hundreds of steps instead of thousands; then the length grows.
#   bash examples/demo/make_base.sh [RUN_DIR]        the result is in RUN_DIR/hf; to distribute it, copy it to examples/demo/base
set -euo pipefail
cd "$(dirname "$0")/../.."

RUNS=${1:-runs/demo_base}
export OMP_NUM_THREADS=1
mkdir -p "$RUNS"

[ -d "$RUNS/tokenizer" ] || python examples/demo/corpus.py tokenizer --output "$RUNS/tokenizer"

# Write documents and pack them into rows: name, length, more arguments.
rows_of() {
    python examples/demo/corpus.py documents --tokenizer "$RUNS/tokenizer" --length "$2" --output "$RUNS/$1.jsonl" "${@:3}"
    python tools/prepare_data.py pretrain --input "$RUNS/$1.jsonl" --tokenizer "$RUNS/tokenizer" --seq-length "$2" --separator-token eos --output "$RUNS/$1"
}
# Length in tokens, global batch, micro-batch, iterations, first and last learning rate, and the weights to start from.
stage() {
    local length=$1 rows=$2 micro=$3 steps=$4 lr=$5 min_lr=$6
    local last
    last="$RUNS/$length/iter_$(printf %07d "$steps")"
    if [ ! -d "$last" ]; then
        rows_of "$length-rows" "$length" --rows $((rows * steps)) --seed "$length" --list 0.2 --whole 0.8
        rows_of "$length-held_out" "$length" --rows 128 --seed 1 --list 0
        torchrun --standalone --nproc-per-node 2 tools/train.py --recipe tiny --tokenizer "$RUNS/tokenizer" \
            --set train.seq_length="$length" train.global_batch="$rows" train.micro_batch="$micro" train.iterations="$steps" \
                train.lr="$lr" train.min_lr="$min_lr" train.eval_every=100 train.save_every=200 \
            "${@:7}" --data "$RUNS/$length-rows" --valid "$RUNS/$length-held_out" --save "$RUNS/$length"
    fi
}
stage 64 64 32 300 1e-2 1e-3
stage 256 16 8 400 1e-2 1e-3 --load "$RUNS/64"
stage 512 16 8 800 5e-3 1e-4 --load "$RUNS/256"

[ -d "$RUNS/hf" ] || python tools/convert_hf.py export --load "$RUNS/512" --output "$RUNS/hf" --dtype bf16
python tools/evaluate.py niah --model "$RUNS/hf" --lengths 256,512,1K,2K --samples 8 --output "$RUNS/niah"
