#!/bin/bash
# The complete pipeline on a laptop's CPU with two ranks: a toy model trained from scratch at 512 tokens, extended 8x, and exported to a
# Hugging Face directory. The stages are those of a cluster; this model is trained too little to be useful (see make demo for one that is).
#   bash examples/laptop.sh TOKENIZER_DIR TEXT_FILE...
set -euo pipefail

TOKENIZER=$(realpath "${1:?a Hugging Face tokenizer directory}")
TEXT=("${@:2}")
[ ${#TEXT[@]} -gt 0 ] || { echo "usage: bash examples/laptop.sh TOKENIZER_DIR TEXT_FILE..." >&2; exit 2; }
for i in "${!TEXT[@]}"; do TEXT[i]=$(realpath "${TEXT[i]}"); done
RUNS=${RUNS:-runs/laptop}
BASE_STEPS=${BASE_STEPS:-100}
LONG_STEPS=${LONG_STEPS:-20}

cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
mkdir -p "$RUNS"
VOCAB=$(python -c "import sys, transformers; print(len(transformers.AutoTokenizer.from_pretrained(sys.argv[1])))" "$TOKENIZER")

# Packed rows of both lengths from the same text.
python tools/prepare_data.py pretrain --input "${TEXT[@]}" --tokenizer "$TOKENIZER" --seq-length 512 --output "$RUNS/text_512"
python tools/prepare_data.py pretrain --input "${TEXT[@]}" --tokenizer "$TOKENIZER" --seq-length 4K --output "$RUNS/text_4k"

# From scratch on two data parallel ranks, then extended on two context parallel ranks.
torchrun --standalone --nproc-per-node 2 tools/train.py --recipe tiny --tokenizer "$TOKENIZER" \
    --set runtime.device=cpu model.vocab_size="$VOCAB" train.iterations="$BASE_STEPS" --data "$RUNS/text_512" --save "$RUNS/base"
torchrun --standalone --nproc-per-node 2 tools/train.py --recipe tiny_extend \
    --set runtime.device=cpu train.iterations="$LONG_STEPS" --load "$RUNS/base" --data "$RUNS/text_4k" --save "$RUNS/long"

[ -d "$RUNS/hf" ] || python tools/convert_hf.py export --ckpt "$RUNS/long" --out "$RUNS/hf"
python tools/evaluate.py niah --model "$RUNS/hf" --lengths 512,4K --depths 0,50,100 --trials 2 --device cpu --out "$RUNS/niah"
echo "the model is in $RUNS/hf, its passkey grid in $RUNS/niah"
