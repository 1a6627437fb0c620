#!/bin/bash
# Llama-3.1-8B-Instruct to 256K tokens on one node of 8 GPUs: the recipe of the 1M run with a shorter length, without context parallelism.
#   bash examples/one_node.sh MODEL_DIR "data/text/*.jsonl" [RUN_DIR]
set -euo pipefail

# Relative paths are those of the folder this is called from.
MODEL=$(realpath -m "${1:?Hugging Face directory of Llama-3.1-8B-Instruct}")
TEXT=(${2:?raw documents: .txt .jsonl .jsonl.zst .parquet})
for i in "${!TEXT[@]}"; do TEXT[i]=$(realpath -m "${TEXT[i]}"); done
RUNS=${3:+$(realpath -m "$3")}
RUNS=${RUNS:-runs/one_node}
cd "$(dirname "$0")/.."
STEPS=200

export OMP_NUM_THREADS=8 CUDA_DEVICE_MAX_CONNECTIONS=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1200
mkdir -p "$RUNS"

[ -f "$RUNS/text.json" ] || python tools/prepare_data.py pretrain --input "${TEXT[@]}" --tokenizer "$MODEL" --seq-length 256K --output "$RUNS/text"

status=0
# YaRN factor 32 over 8192 positions = 262,144; 200 iterations of 4 sequences are 210 million tokens.
torchrun --standalone --nproc-per-node 8 tools/train.py --recipe ultralong_1m \
    --set train.seq_length=256K rope.factor=32 parallel.cp=1 train.global_batch=4 train.iterations=$STEPS train.warmup=10 \
    --load-hf "$MODEL" --data "$RUNS/text" --save "$RUNS/pretrain" || status=$?
# A run that was asked to stop saves and exits early; torchrun's exit code is then 1.
LAST="$RUNS/pretrain/iter_$(printf %07d "$STEPS")"
[ -d "$LAST" ] || { echo "training ended before its last iteration (exit code $status); run the same command again to resume" >&2; exit 1; }

[ -d "$RUNS/hf" ] || torchrun --standalone --nproc-per-node 8 tools/convert_hf.py export --load "$RUNS/pretrain" --output "$RUNS/hf" --dtype bf16

python tools/evaluate.py niah --model "$RUNS/hf" --lengths 32K,128K,255K --samples 5 --output "$RUNS/niah"
