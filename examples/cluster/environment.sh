#!/bin/bash
# Environment of the ranks, on every node: node.sh sources this file. The one place for module loads, a virtual environment, and NCCL's settings.
set -euo pipefail

# ---- Python --------------------------------------------------------------------------------------------
# Where the environment of the submitting shell does not reach the nodes, or is not theirs:
#   module load cuda/12.8
#   source /shared/venv/bin/activate

# ---- PyTorch and Megatron-Core -------------------------------------------------------------------------
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# One hardware queue, so that communication starts in the order in which Megatron-Core issues it.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Long sequences need large blocks: let the allocator grow segments instead of fragmenting memory.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# Seconds that torchrun leaves its ranks after a SIGTERM, to save a checkpoint; its default of 30 is too short (torch 2.13 or later).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-1200}

# ---- NCCL ----------------------------------------------------------------------------------------------
# NCCL finds links and topology by itself; set these only where tools/check_cluster.py shows a group far slower than its links. Names as in
# NCCL's documentation. Those that start with # are off.
# What NCCL found: `INFO` prints the links and rings of each rank at start.
#   export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,GRAPH
# InfiniBand adapters to use, where a node has some for storage or management too; check_cluster.py lists them all. The prefix = means exactly.
#   export NCCL_IB_HCA="=mlx5_0,mlx5_1,mlx5_2,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_7"
# Interface of the first contact between nodes (NCCL's over TCP, and gloo's), where the default is one that other nodes cannot reach.
#   export NCCL_SOCKET_IFNAME=bond0 GLOO_SOCKET_IFNAME=bond0
# RoCE only: the index of the RoCE v2 address (show_gids), and the traffic class of the fabric.
#   export NCCL_IB_GID_INDEX=3 NCCL_IB_TC=106
# Seconds that a lost packet is tried again: 4.096 us x 2^TIMEOUT for each of RETRY_CNT tries. Larger for a fabric that drops links for a moment.
#   export NCCL_IB_TIMEOUT=22 NCCL_IB_RETRY_CNT=7
# Plugins of clouds: aws-ofi-nccl (EFA) and gpudirect-tcpx are found on LD_LIBRARY_PATH.
#   export FI_PROVIDER=efa LD_LIBRARY_PATH=/opt/amazon/ofi-nccl/lib:${LD_LIBRARY_PATH:-}
