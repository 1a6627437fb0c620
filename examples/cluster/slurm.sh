#!/bin/bash
# The paper's runs (arXiv 2504.06214) under Slurm, from documents to an evaluated Hugging Face model, as jobs that wait for each other: data on
# a CPU node, continued pretraining, instruction tuning, export on one CPU node, evaluation at the trained length. Settings are in settings.sh:
#   SIZE=1m ROWS=data/ultralong/rows_1m SFT_ROWS=data/ultralong/sft bash examples/cluster/slurm.sh
#   SIZE=4m NODES=16 EXTRA="train.save_every=10" GPU_OPTIONS="--partition=h100 --account=me" CPU_OPTIONS="--partition=cpu" bash ...
#   DRY_RUN=yes ...                                prints the jobs and submits none
# Submitted again it skips what is complete and resumes the rest. docs/getting-started-cluster.md has the first run step by step.
set -euo pipefail

GPU_OPTIONS=${GPU_OPTIONS:-}               # options of sbatch for jobs on GPUs, like --partition=h100 --account=me
CPU_OPTIONS=${CPU_OPTIONS:-}               # and for those that need none: data, export
DRY_RUN=${DRY_RUN:-no}
TIME=${TIME:-24:00:00}                     # limit of training and of evaluation; training that takes longer saves and is requeued
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
check_settings

if [ "$DRY_RUN" = yes ]; then
    sbatch() { printf ' %q' sbatch "$@" >&2; echo >&2; echo "JOB"; }
else
    for program in sbatch squeue; do
        command -v $program > /dev/null || stop "no $program here: run this on a login node of a Slurm cluster, or see examples/cluster/ssh.sh"
    done
    if [ -f "$RUNS/jobs" ]; then
        queued=$(squeue --noheader --format=%i --jobs="$(paste -sd, "$RUNS/jobs")" 2> /dev/null | sort -u | paste -sd' ' || true)
        [ -z "$queued" ] || stop "jobs $queued of $RUNS are in the queue; wait for them, or stop them: scancel --signal=TERM --batch JOB"
    fi
    write_settings
    : > "$RUNS/jobs"
fi

submit() {  # stage, jobs it waits for, nodes, more options
    local wait=()
    [ -z "$2" ] || wait=(--dependency="afterok:$2" --kill-on-invalid-dep=yes)
    job=$(sbatch --parsable --job-name="$(basename "$RUNS")-$1" --output="$RUNS/logs/$1-%j.log" --nodes="$3" "${wait[@]}" "${@:4}" \
        examples/cluster/job.sh "$RUNS/settings.sh" "$1") || {
        if [ -s "$RUNS/jobs" ]; then xargs scancel < "$RUNS/jobs"; fi
        stop "Slurm refused the $1 job (see above); the jobs before it are cancelled. CPU_OPTIONS and GPU_OPTIONS are options of sbatch"
    }
    job=${job%%;*}
    [ "$DRY_RUN" = yes ] || { echo "$job" >> "$RUNS/jobs"; echo "$1: job $job, $3 nodes${2:+, after job $2}; log $RUNS/logs/$1-$job.log"; }
}
complete() { [ -d "$1/iter_$(printf %07d "$2")" ]; }
gpus=(--gpus-per-node="$GPUS_PER_NODE")

job=
if { [ -z "$ROWS" ] && [ ! -f "$RUNS/text.json" ]; } || { [ -n "$CHAT" ] && [ -z "$SFT_ROWS" ] && [ ! -f "$RUNS/chat.json" ]; }; then
    submit data "$job" 1 --time="$TIME" $CPU_OPTIONS
fi
if ! complete "$RUNS/pretrain" "$ITERATIONS"; then
    submit pretrain "$job" "$NODES" --time="$TIME" "${gpus[@]}" $GPU_OPTIONS
fi
if [ -n "$SFT_ROWS$CHAT" ] && ! complete "$RUNS/sft" "$SFT_ITERATIONS"; then
    submit sft "$job" "$SFT_NODES" --time="$TIME" "${gpus[@]}" $GPU_OPTIONS
fi
trained=$job
if [ ! -d "$RUNS/hf" ]; then
    submit export "$trained" 1 --time=2:00:00 $CPU_OPTIONS    # tensor by tensor, without a GPU
fi
if [ ! -f "$RUNS/report/report.md" ]; then
    submit evaluate "$trained" "$EVALUATE_NODES" --time="$TIME" "${gpus[@]}" $GPU_OPTIONS
fi
[ -n "$job" ] || echo "complete: $RUNS/hf, $RUNS/report/report.md"
