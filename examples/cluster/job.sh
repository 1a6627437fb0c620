#!/bin/bash
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@1500
#
# One stage of a run as a Slurm job; examples/cluster/slurm.sh submits it: job.sh RUNS/settings.sh STAGE.
# --mem=0 is all memory of a node; --requeue starts the job again after a node has failed; with --open-mode=append it goes on in the same log.
#
# 25 minutes before the time limit Slurm sends SIGUSR1 to this script alone (B:). Training then saves, and the job requeues itself: it keeps
# its id, so that the jobs that wait for it still do. `scancel --signal=TERM --batch JOB` sends SIGTERM to this script alone: training saves,
# and the job ends with exit code 75. Without --batch the signal would go to the processes of all nodes and not to this script, and a plain
# `scancel JOB` kills them after KillWait, usually 30 s.
set -euo pipefail
if [ -z "${SLURM_JOB_ID:-}" ] || [ $# != 2 ]; then
    echo "job.sh is a Slurm job of examples/cluster/slurm.sh; start that" >&2
    exit 2
fi
# shellcheck disable=SC1090  # written by slurm.sh
source "$1"
stage=$2
cd "$ROOT"
RESTARTS=20    # times that a job requeues itself at most

# ---- how a job runs commands on its nodes --------------------------------------------------------------

options=() command=()
if [ -n "$IMAGE" ]; then
    case $CONTAINER in
        pyxis) options=(--container-image="$IMAGE" --container-mounts="$MOUNTS" --container-workdir="$ROOT" --no-container-mount-home) ;;
        enroot)
            command=(enroot start --rw)
            for mount in ${MOUNTS//,/ }; do command+=(--mount "$mount"); done
            command+=("$IMAGE")
            ;;
        apptainer) command=(apptainer exec --nv --bind "$MOUNTS" --pwd "$ROOT" "$IMAGE") ;;
    esac
fi
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
steps=0 step='' asked='' repeat=''

on_all_ranks() {
    steps=$((steps + 1))
    # Another port than that of a job which has just left these nodes.
    run_step srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --label --kill-on-bad-exit=1 "${options[@]}" \
        "${command[@]}" bash examples/cluster/node.sh "$SLURM_JOB_NUM_NODES" "$GPUS_PER_NODE" \
        "${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000))" "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$steps" \
        "$RUNS/logs/$stage-$SLURM_JOB_ID" "$@"
}
in_one_process() {
    run_step srun --nodes=1 --ntasks=1 --cpu-bind=none "${options[@]}" "${command[@]}" "$@"
}
evaluation() {
    on_all_ranks tools/evaluate.py "$1" "${@:2}" --tp "$TP" --pp "$PP"    # context parallel over the ranks that are left
}

run_step() {  # in the background, since bash handles no signal while it waits for a command
    local status=0
    [ -z "$asked" ] || exit "$STOPPED"
    "$@" &
    step=$!
    while kill -0 "$step" 2> /dev/null; do wait "$step" || true; done
    wait "$step" || status=$?
    step=''
    [ -z "$repeat" ] || kill "$repeat" 2> /dev/null || true
    return "$status"
}

# ---- how it stops --------------------------------------------------------------------------------------

ask() {  # time or user
    asked=$1
    echo "$(date '+%F %T') asked to stop ($1)" >&2
    [ -n "$step" ] || return 0
    # Without --batch scancel signals the processes of all nodes. Ranks that are still starting ignore SIGUSR1, so it is repeated.
    local signal=TERM
    case $stage in pretrain | sft) signal=USR1 ;; esac
    (while kill -0 "$step" 2> /dev/null; do scancel --signal=$signal "$SLURM_JOB_ID" || true; sleep 30; done) &
    repeat=$!
}
trap 'ask time' USR1
trap 'ask user' TERM

progress() {
    { cat "$RUNS"/{pretrain,sft}/latest_checkpointed_iteration.txt "$RUNS"/{before,after}/*/*.predictions.jsonl 2> /dev/null || true; } | cksum
}
before=$(progress)
ended() {
    local status=$?
    [ -z "$repeat" ] || kill "$repeat" 2> /dev/null || true
    [ "$status" != 0 ] && [ -n "$asked" ] || exit "$status"
    case $stage in    # those that leave no record of a clean stop go on where they were
        pretrain | sft) [ "$status" = "$STOPPED" ] || exit "$status" ;;
    esac
    if [ "$asked" = user ]; then
        echo "stopped as asked; run examples/cluster/slurm.sh again to resume" >&2
    elif [ "$(progress)" = "$before" ]; then
        echo "not requeued: nothing was saved between the start and the time limit; raise TIME" >&2
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge "$RESTARTS" ]; then
        echo "not requeued: restarted $RESTARTS times; run examples/cluster/slurm.sh again to resume" >&2
    else
        echo "requeued at its time limit" >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$STOPPED"
}

source examples/stages.sh
trap ended EXIT

# ---- the stage -----------------------------------------------------------------------------------------

echo "$(date '+%F %T') $RECIPE: $stage on $SLURM_JOB_NODELIST (job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0})"
case $stage in
    data) prepare_data ;;
    pretrain)
        check_nodes
        pretrain
        ;;
    sft) instruction_tuning ;;
    export) export_model ;;
    evaluate)
        evaluate before --model "$MODEL"
        evaluate after --load "$(final_checkpoints)"
        report
        ;;
    *) echo "job.sh: no stage $stage" >&2; exit 2 ;;
esac
