#!/bin/bash
# The pipeline of examples/ultralong_{1m,2m,4m}.sh, on a cluster, and of examples/laptop.sh, on a laptop: a Hugging Face model in, continued
# pretraining, instruction tuning, export, evaluation. These scripts set RECIPE, MODEL, TEXT, ROWS, CHAT, SFT_ROWS, BOOKS, RUNS, LENGTHS and
# SETTINGS, define on_all_ranks and in_one_process, and source this file. A stage whose output exists is skipped; training resumes from its
# newest checkpoint.
set -euo pipefail

# Tokens per sequence and iterations of the two recipes, as SETTINGS change them.
values=$(python -c 'import sys
from megatron_ultralong import command_settings, recipes
from megatron_ultralong.runtime import cli
def show(name, *changes):
    for recipe in (name, f"{name}_sft"):
        train = command_settings.override(recipes.get(recipe), list(changes)).train
        print(train.seq_length, train.iterations, end=" ")
cli.main(lambda: show(*sys.argv[1:]))' "$RECIPE" $SETTINGS)
read -r LENGTH ITERATIONS SFT_LENGTH SFT_ITERATIONS <<< "$values"

train() {  # recipe, its iterations, run directory, more arguments
    local last status=0
    last="$3/iter_$(printf %07d "$2")"
    [ ! -d "$last" ] || return 0
    on_all_ranks tools/train.py --recipe "$1" --save "$3" ${SETTINGS:+--set $SETTINGS} "${@:4}" || status=$?
    # A run that was asked to stop saves and exits early; torchrun's exit code is then 1.
    [ -d "$last" ] || { echo "$1 ended before its last iteration (exit code $status); start the script again to resume" >&2; exit 1; }
}
evaluate() {  # name, model
    [ -f "$RUNS/$1/niah/niah.png" ] || in_one_process python tools/evaluate.py niah --model "$2" --lengths "$LENGTHS" --samples 5 --output "$RUNS/$1/niah"
    [ -z "$BOOKS" ] || [ -f "$RUNS/$1/perplexity/perplexity.json" ] || in_one_process python tools/evaluate.py perplexity \
        --model "$2" --data $BOOKS --lengths "$LENGTHS" --output "$RUNS/$1/perplexity"
}
say() { printf '\n== %s ==\n' "$1"; }
mkdir -p "$RUNS"

say "1. documents, and conversations, to packed rows of S + 1 tokens, unless given"
if [ -z "$ROWS" ]; then
    ROWS="$RUNS/text"
    [ -f "$ROWS.json" ] || in_one_process python tools/prepare_data.py pretrain \
        --input $TEXT --tokenizer "$MODEL" --seq-length "$LENGTH" --output "$ROWS"
fi
if [ -z "$SFT_ROWS" ] && [ -n "$CHAT" ]; then
    SFT_ROWS="$RUNS/chat"
    [ -f "$SFT_ROWS.json" ] || in_one_process python tools/prepare_data.py sft --fit single \
        --input $CHAT --tokenizer "$MODEL" --seq-length "$SFT_LENGTH" --output "$SFT_ROWS"
fi

say "2. continued pretraining, directly at the target length"
train "$RECIPE" "$ITERATIONS" "$RUNS/pretrain" --load-hf "$MODEL" --data "$ROWS"
FINAL="$RUNS/pretrain"

if [ -n "$SFT_ROWS" ]; then
    say "3. instruction tuning on short examples; RoPE is unchanged"
    train "${RECIPE}_sft" "$SFT_ITERATIONS" "$RUNS/sft" --load "$RUNS/pretrain" --data "$SFT_ROWS"
    FINAL="$RUNS/sft"
fi

say "4. export to a Hugging Face directory"
[ -d "$RUNS/hf" ] || in_one_process python tools/convert_hf.py export --load "$FINAL" --output "$RUNS/hf" --dtype bf16

say "5. passkey grid, and perplexity if BOOKS are given, before and after"
evaluate before "$MODEL"
evaluate after "$RUNS/hf"
python tools/evaluate.py report --results before="$RUNS/before" after="$RUNS/after" --no-published --output "$RUNS/report"

echo
sed 1,2d "$RUNS/report/report.md"
echo "model         $RUNS/hf"
echo "checkpoints   $FINAL"
echo "evaluation    $RUNS/report, $RUNS/before, $RUNS/after"
