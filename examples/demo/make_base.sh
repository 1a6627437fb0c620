#!/bin/bash
# Makes the demo's base model, examples/demo/base: a Llama of 0.6 million parameters from scratch with 512 tokens of context. About
# half an hour on two cores. Retrieval is learned at 64 tokens first, in hundreds of steps instead of thousands; then the texts grow.
#   bash examples/demo/make_base.sh [RUN_DIR]        the result is in RUN_DIR/hf; to ship it, copy it to examples/demo/base
set -euo pipefail
cd "$(dirname "$0")/../.."

RUNS=${1:-runs/demo_base}
export OMP_NUM_THREADS=1
mkdir -p "$RUNS"

[ -d "$RUNS/tokenizer" ] || python examples/demo/corpus.py tokenizer --output "$RUNS/tokenizer"

# Documents and packed rows of them: name, length, more arguments.
rows_of() {
    python examples/demo/corpus.py documents --tokenizer "$RUNS/tokenizer" --length "$2" --output "$RUNS/$1.jsonl" "${@:3}"
    python tools/prepare_data.py pretrain --input "$RUNS/$1.jsonl" --tokenizer "$RUNS/tokenizer" --seq-length "$2" --separator-token eos --output "$RUNS/$1"
}
# Name, rows an iteration, rows of a micro-batch, iterations, learning rate at the start and at the end, and what to start from.
# The name is the length in tokens, with a number behind a point where there are several stages of a length.
stage() {
    local name=$1 rows=$2 micro=$3 steps=$4 lr=$5 min_lr=$6
    local length=${name%%.*} last="$RUNS/$name/iter_$(printf %07d "$steps")"
    if [ ! -d "$last" ]; then
        rows_of "$name-rows" "$length" --rows $((rows * steps)) --seed "${name/./}" --repeat 0.05 --list 0.25 --whole 0.8
        rows_of "$name-held_out" "$length" --rows 128 --seed 1 --repeat 0 --list 0
        torchrun --standalone --nproc-per-node 2 tools/train.py --recipe tiny --tokenizer "$RUNS/tokenizer" \
            --set train.seq_length="$length" train.global_batch="$rows" train.micro_batch="$micro" train.iterations="$steps" \
                train.lr="$lr" train.min_lr="$min_lr" train.eval_every=100 train.save_every=200 \
            "${@:7}" --data "$RUNS/$name-rows" --valid "$RUNS/$name-held_out" --save "$RUNS/$name"
    fi
}
stage 64 64 32 600 1e-2 3e-3
stage 128 32 16 400 6e-3 2e-3 --load "$RUNS/64"
stage 512 16 8 800 3e-3 1e-4 --load "$RUNS/128"
stage 512.2 16 8 1200 3e-3 1e-4 --load "$RUNS/512"

[ -d "$RUNS/hf" ] || python tools/convert_hf.py export --ckpt "$RUNS/512.2" --out "$RUNS/hf" --dtype bf16
python tools/evaluate.py niah --model "$RUNS/hf" --lengths 256,512,1K,2K --trials 8 --out "$RUNS/niah"
