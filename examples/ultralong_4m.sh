#!/bin/bash
#SBATCH --job-name=ultralong_4m
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=28:00:00
#SBATCH --signal=TERM@1500
#SBATCH --output=%x-%j.log
#
# Llama-3.1-8B-Instruct to 4M tokens as in arXiv 2504.06214: continued pretraining, instruction tuning, export, evaluation.
#   sbatch examples/ultralong_4m.sh       from the top of the repository; submit again to resume
set -euo pipefail

RECIPE=ultralong_4m                        # and ${RECIPE}_sft for instruction tuning
MODEL=models/Llama-3.1-8B-Instruct         # Hugging Face directory, read in place
TEXT="data/text/*.jsonl.zst"               # raw documents; not used if ROWS is set
ROWS=                                      # packed rows of 4M + 1 tokens, like data/ultralong/rows_4m of examples/ultralong_data.sh
CHAT=                                      # conversations in any published format; not used if SFT_ROWS is set
SFT_ROWS=                                  # packed conversations of 8192 + 1 tokens per row, like data/ultralong/sft; both empty = no instruction tuning
BOOKS=                                     # long documents such as PG19, for perplexity; empty = none
RUNS=runs/ultralong_4m
LENGTHS=32K,128K,255K                      # of passkey grid and perplexity: lengths that fit one GPU in plain transformers
SETTINGS=                                  # changes of both recipes, like train.save_every=10

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
if [ ! -f examples/slurm.sh ]; then
    echo "submit from the top of the repository, not from $PWD" >&2
    exit 2
fi
source examples/slurm.sh
source examples/ultralong_stages.sh
