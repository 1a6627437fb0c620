#!/bin/bash
# What runs on each node: torchrun with the ranks of this node. job.sh starts it by srun, ssh.sh by ssh.
#   node.sh NODES RANKS_PER_NODE HEAD:PORT ID LOG tools/TOOL.py ...
# SIGUSR1 asks the ranks to save and stop, and torchrun's exit code is then 0; SIGTERM does so through torchrun, whose exit code is then 1.
set -euo pipefail
nodes=$1 ranks=$2 head=$3 id=$4 log=$5
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/cluster/environment.sh

# This node's log, beside what the scheduler collects from all nodes. It outlives a signal, so that the last lines are not lost.
exec > >(trap '' INT TERM USR1; exec tee -a "$log-$(hostname -s).log") 2>&1
echo $$ > "$log-$(hostname -s).pid"

# torchrun would end at SIGUSR1; ranks that train handle it.
(trap '' USR1; exec torchrun --nnodes "$nodes" --nproc-per-node "$ranks" --rdzv-backend c10d --rdzv-endpoint "$head" --rdzv-id "$id" "${@:6}") &
torchrun=$!
# A scheduler may send a signal to this process alone, or to all of the node; a second one does no harm.
# shellcheck disable=SC2329  # called by a trap
ask_ranks() {
    local children
    children=$(cat /proc/"$torchrun"/task/*/children 2> /dev/null || true)
    [ -z "$children" ] || kill -USR1 $children 2> /dev/null || true
}
trap ask_ranks USR1
trap 'kill -TERM $torchrun 2> /dev/null || true' TERM INT
while kill -0 "$torchrun" 2> /dev/null; do wait "$torchrun" || true; done    # wait ends at a signal, too
status=0
wait "$torchrun" || status=$?
rm -f "$log-$(hostname -s).pid"
exit "$status"
