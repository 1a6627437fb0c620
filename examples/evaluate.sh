#!/bin/bash
# Evaluates a model by the paper's protocol: passkey grid, RULER, LV-Eval, InfiniteBench and the standard benchmarks, then prints what was
# measured beside the published figures, and what differs between the two. Runs on one node; when run again it resumes where it was stopped.
#   bash examples/evaluate.sh models/Llama-3.1-8B-UltraLong-1M-Instruct
#   bash examples/evaluate.sh runs/ultralong_1m/hf UltraLong-1M    # a model of your own beside the figures of this one
# A released model (UltraLong, ProLong, Gradient, Llama-3.1-8B-Instruct) is recognised by the name of its directory.
set -euo pipefail

MODEL=$(realpath -m "${1:?a Hugging Face model directory}")
PUBLISHED=${2:+--published $2}
[ -z "${OUT:-}" ] || OUT=$(realpath -m "$OUT")
cd "$(dirname "$0")/.."

OUT=${OUT:-runs/evaluation}                 # of all models; each has a folder in it
RANKS=${RANKS:-8}                           # GPUs; 1 = plain transformers
LAYOUT=${LAYOUT---tp $RANKS}                # of --engine megatron on RANKS: --tp, --pp, --cp
# Options of each benchmark (python tools/evaluate.py NAME --help); an empty value skips it. The official wording of the prompts is read from
# a checkout of its authors: --official DIR, for RULER, LV-Eval and InfiniteBench.
NIAH=${NIAH-"--lengths 32K,128K,512K,1M --samples 10"}
RULER=${RULER-"--lengths 4K,8K,16K,32K,64K,128K,256K,512K,1M --samples 500"}    # --squad, --hotpotqa and --haystack: its authors' texts
LVEVAL=${LVEVAL-"--data hub"}               # or the folder of its official files
INFINITEBENCH=${INFINITEBENCH-"--data hub"}
STANDARD=${STANDARD-"--tasks paper --run-code"}    # runs HumanEval's programs, see docs/how-to-evaluate-standard.md
PERPLEXITY=${PERPLEXITY-}                   # not in the paper; --data of long documents such as PG19, --lengths 4K,32K,128K

RESULTS="$OUT/$(basename "$MODEL")"

ask() {  # benchmark, its options; evaluates the model on RANKS
    if [ "$RANKS" -gt 1 ]; then
        torchrun --standalone --nproc-per-node "$RANKS" tools/evaluate.py "$1" --model "$MODEL" $LAYOUT --output "$RESULTS/$1" "${@:2}"
    else
        python tools/evaluate.py "$1" --model "$MODEL" --output "$RESULTS/$1" "${@:2}"
    fi
}
beside_published() {
    python tools/evaluate.py published --model "$MODEL" $PUBLISHED --output "$RESULTS"
}

beside_published > /dev/null    # a wrong directory or name ends here, before hours of work
if [ -n "$NIAH" ]; then ask niah $NIAH; fi
if [ -n "$RULER" ]; then
    # Generating prompts needs no GPU, so it is done before the ranks start.
    python tools/evaluate.py ruler --stage prepare --model "$MODEL" --output "$RESULTS/ruler" $RULER
    ask ruler --stage predict $RULER
    python tools/evaluate.py ruler --stage score --output "$RESULTS/ruler" $RULER
fi
if [ -n "$LVEVAL" ]; then ask lveval $LVEVAL; fi
if [ -n "$INFINITEBENCH" ]; then ask infinitebench $INFINITEBENCH; fi
if [ -n "$STANDARD" ]; then ask standard $STANDARD; fi
if [ -n "$PERPLEXITY" ]; then ask perplexity $PERPLEXITY; fi

python tools/evaluate.py report --results "$OUT" --output "$OUT/report"    # this model next to the others in $OUT
beside_published
