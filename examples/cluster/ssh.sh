#!/bin/bash
# The paper's runs without a scheduler: all stages one after the other, torchrun on each host by ssh. Start it on the first host, or on any
# machine that reaches all of them without a password and shares this repository and RUNS with them. Settings are in settings.sh:
#   HOSTS="node-1 node-2 node-3 node-4" SIZE=1m ROWS=data/ultralong/rows_1m bash examples/cluster/ssh.sh
# Ctrl-C or SIGTERM saves and stops; started again it skips what is complete and resumes the rest.
set -euo pipefail

HOSTS=${HOSTS:-}                           # names or addresses, the first one that of torchrun's store
SSH=${SSH:-ssh}                            # and its options
PORT=${PORT:-29500}
read -ra hosts <<< "$HOSTS"
NODES=${#hosts[@]} SFT_NODES=${#hosts[@]} EVALUATE_NODES=${#hosts[@]}
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[ "$NODES" != 0 ] || stop 'HOSTS is empty; give the names of the hosts: HOSTS="node-1 node-2" bash examples/cluster/ssh.sh'
[ -z "$IMAGE" ] || stop "IMAGE: ssh.sh starts no containers; run it inside of them"
check_settings
write_settings

asked='' node_log=''
on_host() { $SSH "$1" "cd $(printf %q "$ROOT") && $(printf '%q ' "${@:2}")"; }    # host, command
on_all_ranks() {
    local host pids=() status=0 failed=0
    [ -z "$asked" ] || exit "$STOPPED"
    node_log=$RUNS/logs/$(basename "$1" .py)-$(date +%Y%m%d-%H%M%S)
    for host in "${hosts[@]}"; do
        on_host "$host" bash examples/cluster/node.sh "$NODES" "$GPUS_PER_NODE" "${hosts[0]}:$PORT" "$(basename "$node_log")" "$node_log" "$@" 2>&1 < /dev/null |
            sed -u "s/^/$host: /" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        while kill -0 "$pid" 2> /dev/null; do wait "$pid" || true; done
        wait "$pid" || status=$?
        [ "$status" = 0 ] || failed=$status
    done
    return "$failed"
}
in_one_process() { "$@"; }
evaluation() { on_all_ranks tools/evaluate.py "$1" "${@:2}" --tp "$TP" --pp "$PP"; }
ask() {    # node.sh hands it to the ranks of its host
    local host
    asked=yes
    echo "asked to stop" >&2
    for host in "${hosts[@]}"; do
        $SSH "$host" "kill -USR1 \$(cat $(printf %q "$node_log")-\$(hostname -s).pid)" < /dev/null || true
    done
}
trap ask TERM INT

say "1. packed rows of S + 1 tokens"
prepare_data
say "2. continued pretraining"
check_nodes
pretrain
say "3. instruction tuning"
instruction_tuning
say "4. export"
export_model
say "5. evaluation"
evaluate before --model "$MODEL"
evaluate after --load "$(final_checkpoints)"
report
