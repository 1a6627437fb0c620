#!/bin/bash
# The stages of examples/ultralong_{1m,2m,4m}.sh, which set SIZE, MODEL, TEXT, ROWS, SFT_ROWS, RUNS and LENGTHS and source this
# file inside a Slurm job. A stage whose output exists is skipped; training resumes from its newest checkpoint.
set -euo pipefail

export OMP_NUM_THREADS=8
# One hardware queue, so that communication starts in the order in which Megatron-Core issues it.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Long sequences need large blocks: let the allocator grow segments instead of fragmenting memory.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
# On Slurm's SIGTERM the current iteration ends and a checkpoint is saved; torchrun's default of 30 s is too short for that.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1200

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
on_all_nodes() {
    srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=8 --rdzv-backend=c10d \
        --rdzv-endpoint="$head_node:29500" --rdzv-id="$SLURM_JOB_ID" "$@"
}
on_one_node() {
    srun --nodes=1 --ntasks=1 "$@"
}
# Whether run directory $1 has the last iteration of recipe $2: a run that was asked to stop saves and exits early.
finished() {
    [ -d "$1/$(python -c "from megatron_ultralong import recipes; print(f'iter_{recipes.get(\"$2\").train.iterations:07d}')")" ]
}
train() {  # recipe, run directory, more arguments
    on_all_nodes tools/train.py --recipe "$1" --save "$2" "${@:3}"
    finished "$2" "$1" || { echo "$1 was stopped before its end; submit again to resume"; exit 1; }
}
mkdir -p "$RUNS"

# 1. Documents to packed rows of S + 1 tokens, unless given.
if [ -z "$ROWS" ]; then
    ROWS="$RUNS/text"
    [ -f "$ROWS.json" ] || on_one_node python tools/prepare_data.py pretrain \
        --input $TEXT --tokenizer "$MODEL" --seq-length "${SIZE^^}" --output "$ROWS"
fi

# 2. Continued pretraining, directly at the target length.
train "ultralong_$SIZE" "$RUNS/pretrain" --load-hf "$MODEL" --data "$ROWS"
FINAL="$RUNS/pretrain"

# 3. Instruction tuning on short examples, if given; RoPE is unchanged.
if [ -n "$SFT_ROWS" ]; then
    train "ultralong_${SIZE}_sft" "$RUNS/sft" --load "$RUNS/pretrain" --data "$SFT_ROWS"
    FINAL="$RUNS/sft"
fi

# 4. Export to a Hugging Face directory.
[ -d "$RUNS/hf" ] || on_one_node python tools/convert_hf.py export --ckpt "$FINAL" --out "$RUNS/hf" --dtype bf16

# 5. Passkey grid.
on_one_node python tools/evaluate.py niah --model "$RUNS/hf" --lengths "$LENGTHS" --trials 5 --out "$RUNS/niah"
