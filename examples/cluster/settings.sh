#!/bin/bash
# Settings of a run on a cluster, each from the environment or with this default. slurm.sh and ssh.sh source this file.
set -euo pipefail

SIZE=${SIZE:-1m}                           # of the paper's runs: 1m, 2m or 4m
RECIPE=${RECIPE:-ultralong_$SIZE}          # and ${RECIPE}_sft for instruction tuning
EXTRA=${EXTRA:-}                           # settings of pretraining as for --set, like "train.save_every=10 memory.query_chunks=true"
EXTRA_SFT=${EXTRA_SFT:-}                   # settings of instruction tuning
RUNS=${RUNS:-runs/$RECIPE}                 # folder of the run, on storage that all nodes share

MODEL=${MODEL:-models/Llama-3.1-8B-Instruct}    # Hugging Face directory, read in place
TEXT=${TEXT:-data/text/*.jsonl.zst}        # raw documents; not used if ROWS is set
ROWS=${ROWS:-}                             # packed rows, like data/ultralong/rows_1m of examples/ultralong_data.sh
CHAT=${CHAT:-}                             # conversations in any published format; not used if SFT_ROWS is set
SFT_ROWS=${SFT_ROWS:-}                     # packed conversations, like data/ultralong/sft; both empty = no instruction tuning
BOOKS=${BOOKS:-}                           # long documents such as PG19, for perplexity; empty = none

NODES=${NODES:-32}                         # of pretraining
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
SFT_NODES=${SFT_NODES:-$NODES}
EVALUATE_NODES=${EVALUATE_NODES:-}         # empty = those of one replica, TP x PP x CP of the recipe
LENGTHS=${LENGTHS:-}                       # of the passkey grid, tokens; empty = 1/8, 1/4, 1/2 and all of the trained length
SAMPLES=${SAMPLES:-5}                      # prompts for each length and depth
CHECK=${CHECK:-yes}                        # run tools/check_cluster.py before the first iteration: yes or no

IMAGE=${IMAGE:-}                           # container image of all jobs; empty = the nodes' own Python
CONTAINER=${CONTAINER:-pyxis}              # what runs it: pyxis (srun --container-image), enroot, or apptainer
MOUNTS=${MOUNTS:-}                         # SOURCE:TARGET,... of the container; empty = this repository and RUNS

PYTHON=${PYTHON:-python}                   # of this machine: reads the recipe, trains nothing

stop() { echo "error: $1" >&2; exit 2; }

# Paths are those of the folder the script is called from; afterwards this is the top of the repository.
ROOT=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
FROM=$PWD
in_callers_folder() {  # paths and globs, to absolute paths
    local path all=()
    for path in $1; do
        [[ $path = /* ]] || path=$FROM/$path
        all+=("$path")
    done
    echo "${all[*]}"
}
for name in TEXT CHAT BOOKS; do
    printf -v "$name" %s "$(in_callers_folder "${!name}")"
done
for name in RUNS MODEL ROWS SFT_ROWS; do
    [ -z "${!name}" ] || printf -v "$name" %s "$(realpath -m "${!name}")"
done
cd "$ROOT"
SETTINGS=$EXTRA SFT_SETTINGS=$EXTRA_SFT

source examples/stages.sh

check_settings() {
    [ -f "$MODEL/config.json" ] || stop "MODEL=$MODEL is no Hugging Face directory (no config.json); see docs/getting-started-cluster.md"
    local name file
    for name in ROWS SFT_ROWS; do
        [ -z "${!name}" ] || [ -f "${!name}.json" ] || stop "$name=${!name}: no packed rows there (no ${!name}.json)"
    done
    for name in TEXT CHAT BOOKS; do
        [ "$name" = TEXT ] && [ -n "$ROWS" ] && continue
        [ "$name" = CHAT ] && [ -n "$SFT_ROWS" ] && continue
        for file in ${!name}; do [ -e "$file" ] || stop "$name=$file: no such file"; done
    done
    case $CONTAINER in pyxis | enroot | apptainer) ;; *) stop "CONTAINER=$CONTAINER: give pyxis, enroot or apptainer" ;; esac
    case $CHECK in yes | no) ;; *) stop "CHECK=$CHECK: give yes or no" ;; esac
    read_recipes
    local replica=$((TP * PP * CP)) sft_replica=$((SFT_TP * SFT_PP * SFT_CP))
    divides "$NODES" "$replica" NODES "$RECIPE"
    [ -z "$SFT_ROWS$CHAT" ] || divides "$SFT_NODES" "$sft_replica" SFT_NODES "${RECIPE}_sft"
    EVALUATE_NODES=${EVALUATE_NODES:-$(((replica + GPUS_PER_NODE - 1) / GPUS_PER_NODE))}
    divides "$EVALUATE_NODES" $((TP * PP)) EVALUATE_NODES evaluation
    LENGTHS=${LENGTHS:-$((LENGTH / 8)),$((LENGTH / 4)),$((LENGTH / 2)),$LENGTH}
    MOUNTS=${MOUNTS:-$ROOT:$ROOT,$RUNS:$RUNS}
}
divides() {  # nodes, GPUs of a replica, name of the setting, what runs there
    [ $(($1 * GPUS_PER_NODE % $2)) = 0 ] ||
        stop "$3=$1: $1 x $GPUS_PER_NODE GPUs are no multiple of the $2 of one replica of $4; change $3 or the layout in EXTRA"
}

# What the jobs of a run need, as a file that they source, so that a job that waits or is requeued keeps the settings it was submitted with.
write_settings() {
    mkdir -p "$RUNS/logs" 2> /dev/null || stop "RUNS=$RUNS: no folder that can be written"
    declare -p ROOT RECIPE SETTINGS SFT_SETTINGS RUNS MODEL TEXT ROWS CHAT SFT_ROWS BOOKS LENGTH ITERATIONS TP PP CP SFT_LENGTH \
        SFT_ITERATIONS LENGTHS SAMPLES CHECK GPUS_PER_NODE IMAGE CONTAINER MOUNTS > "$RUNS/settings.sh"
}
