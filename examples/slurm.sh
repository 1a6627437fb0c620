#!/bin/bash
# How examples/ultralong_{1m,2m,4m}.sh, which source this file inside a Slurm job, run the commands of examples/ultralong_stages.sh.
set -euo pipefail
if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "$0 is a Slurm job: start it with sbatch $0; examples/one_node.sh runs without Slurm" >&2
    exit 2
fi

export OMP_NUM_THREADS=8
# One hardware queue, so that communication starts in the order in which Megatron-Core issues it.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Long sequences need large blocks: let the allocator grow segments instead of fragmenting memory.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
# On Slurm's SIGTERM the current iteration ends and a checkpoint is saved; torchrun's default of 30 s is too short for that.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1200

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
on_all_ranks() {
    srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=8 --rdzv-backend=c10d \
        --rdzv-endpoint="$head_node:29500" --rdzv-id="$SLURM_JOB_ID" "$@"
}
in_one_process() {
    srun --nodes=1 --ntasks=1 "$@"
}
