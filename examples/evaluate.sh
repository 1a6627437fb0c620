#!/bin/bash
# The paper's tables: passkey grid, RULER, LV-Eval, InfiniteBench, standard benchmarks and perplexity by position for every model, then the
# report next to the published figures. Runs on one node; when run again it resumes where it was stopped (perplexity starts from the beginning).
#   MODELS="models/Llama-3.1-8B-1M models/Llama-3.1-8B-Instruct" bash examples/evaluate.sh
set -euo pipefail
cd "$(dirname "$0")/.."

MODELS=${MODELS:-models/Llama-3.1-8B-1M models/Llama-3.1-8B-Instruct}  # Hugging Face directories
OUT=${OUT:-runs/evaluation}
RANKS=${RANKS:-8}                           # GPUs; 1 = plain transformers
LAYOUT=${LAYOUT---tp $RANKS}                # of --engine megatron on RANKS: --tp, --pp, --cp
NIAH=${NIAH-32K,128K,512K,1M}               # lengths of the passkey grid; an empty value skips a benchmark
TRIALS=${TRIALS:-10}
RULER=${RULER-4K,8K,16K,32K,64K,128K,256K,512K,1M}
SAMPLES=${SAMPLES:-500}                     # of RULER, per task and length; its authors use 500
RULER_FILES=${RULER_FILES-}                 # --squad dev-v2.0.json --hotpotqa hotpot_dev_distractor_v1.json --haystack PaulGrahamEssays.json
LVEVAL=${LVEVAL-hub}                        # official files: a directory, or hub
INFINITEBENCH=${INFINITEBENCH-hub}
STANDARD=${STANDARD-paper}                  # tasks of lm-evaluation-harness; HumanEval's programs are executed, see docs/how-to-evaluate-standard.md
BOOKS=${BOOKS-}                             # long documents for perplexity, such as PG19: files or globs
PERPLEXITY=${PERPLEXITY-4K,32K,128K}

ask() {  # benchmark, more arguments; evaluates $model on RANKS
    if [ "$RANKS" -gt 1 ]; then
        torchrun --standalone --nproc-per-node "$RANKS" tools/evaluate.py "$1" --model "$model" $LAYOUT --out "$out/$1" "${@:2}"
    else
        python tools/evaluate.py "$1" --model "$model" --out "$out/$1" "${@:2}"
    fi
}

if [ "$(for model in $MODELS; do basename "$model"; done | sort | uniq -d)" ]; then
    echo "MODELS: two directories have the same name and would share a folder in $OUT; rename one" >&2; exit 2
fi
for model in $MODELS; do
    out="$OUT/$(basename "$model")"
    if [ -n "$NIAH" ]; then ask niah --lengths "$NIAH" --trials "$TRIALS"; fi
    if [ -n "$RULER" ]; then
        # Generating prompts needs no GPU, so it is done before the ranks start.
        python tools/evaluate.py ruler --stage prepare --model "$model" --out "$out/ruler" --lengths "$RULER" --samples "$SAMPLES" $RULER_FILES
        ask ruler --stage predict --lengths "$RULER" --samples "$SAMPLES" $RULER_FILES
        python tools/evaluate.py ruler --stage score --out "$out/ruler" --lengths "$RULER" --samples "$SAMPLES" $RULER_FILES
    fi
    if [ -n "$LVEVAL" ]; then ask lveval --data "$LVEVAL"; fi
    if [ -n "$INFINITEBENCH" ]; then ask infinitebench --data "$INFINITEBENCH"; fi
    if [ -n "$STANDARD" ]; then ask standard --tasks "$STANDARD" --run-code; fi
    if [ -n "$BOOKS" ]; then ask perplexity --data $BOOKS --lengths "$PERPLEXITY"; fi
done

python tools/evaluate.py report --results "$OUT" --out "$OUT/report"
