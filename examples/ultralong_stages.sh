#!/bin/bash
# The pipeline of examples/ultralong_{1m,2m,4m}.sh, on a cluster, and of examples/laptop.sh, on a laptop: a Hugging Face model in, continued
# pretraining, instruction tuning, export, evaluation. These scripts set RECIPE, MODEL, TEXT, ROWS, CHAT, SFT_ROWS, BOOKS, RUNS, LENGTHS and
# SETTINGS, define on_all_ranks and in_one_process, and source this file. A stage whose output exists is skipped; training resumes from its
# newest checkpoint.
set -euo pipefail

of_recipe() {  # recipe, setting; prints it as SETTINGS change it
    python -c 'import sys
from megatron_ultralong import command_settings, recipes
name, setting, *changes = sys.argv[1:]
print(getattr(command_settings.override(recipes.get(name), changes).train, setting))' "$1" "$2" $SETTINGS
}
# Whether run directory $1 has the last iteration of recipe $2: a run that was asked to stop saves and exits early.
finished() {
    [ -d "$1/iter_$(printf %07d "$(of_recipe "$2" iterations)")" ]
}
train() {  # recipe, run directory, more arguments
    finished "$2" "$1" && return
    on_all_ranks tools/train.py --recipe "$1" --save "$2" ${SETTINGS:+--set $SETTINGS} "${@:3}"
    finished "$2" "$1" || { echo "$1 was stopped before its end; start the script again to resume"; exit 1; }
}
evaluate() {  # name, model
    [ -f "$RUNS/$1/niah/niah.png" ] || in_one_process python tools/evaluate.py niah --model "$2" --lengths "$LENGTHS" --trials 5 --out "$RUNS/$1/niah"
    [ -z "$BOOKS" ] || [ -f "$RUNS/$1/perplexity/perplexity.json" ] || in_one_process python tools/evaluate.py perplexity \
        --model "$2" --data $BOOKS --lengths "$LENGTHS" --out "$RUNS/$1/perplexity"
}
say() { printf '\n== %s ==\n' "$1"; }
mkdir -p "$RUNS"

say "1. documents, and conversations, to packed rows of S + 1 tokens, unless given"
if [ -z "$ROWS" ]; then
    ROWS="$RUNS/text"
    [ -f "$ROWS.json" ] || in_one_process python tools/prepare_data.py pretrain \
        --input $TEXT --tokenizer "$MODEL" --seq-length "$(of_recipe "$RECIPE" seq_length)" --output "$ROWS"
fi
if [ -z "$SFT_ROWS" ] && [ -n "$CHAT" ]; then
    SFT_ROWS="$RUNS/chat"
    [ -f "$SFT_ROWS.json" ] || in_one_process python tools/prepare_data.py sft --fit single \
        --input $CHAT --tokenizer "$MODEL" --seq-length "$(of_recipe "${RECIPE}_sft" seq_length)" --output "$SFT_ROWS"
fi

say "2. continued pretraining, directly at the target length"
train "$RECIPE" "$RUNS/pretrain" --load-hf "$MODEL" --data "$ROWS"
FINAL="$RUNS/pretrain"

if [ -n "$SFT_ROWS" ]; then
    say "3. instruction tuning on short examples; RoPE is unchanged"
    train "${RECIPE}_sft" "$RUNS/sft" --load "$RUNS/pretrain" --data "$SFT_ROWS"
    FINAL="$RUNS/sft"
fi

say "4. export to a Hugging Face directory"
[ -d "$RUNS/hf" ] || in_one_process python tools/convert_hf.py export --ckpt "$FINAL" --out "$RUNS/hf" --dtype bf16

say "5. passkey grid, and perplexity if BOOKS are given, before and after"
evaluate before "$MODEL"
evaluate after "$RUNS/hf"
python tools/evaluate.py report --results before="$RUNS/before" after="$RUNS/after" --no-published --out "$RUNS/report"

echo
sed 1,2d "$RUNS/report/report.md"
echo "model         $RUNS/hf"
echo "checkpoints   $FINAL"
echo "evaluation    $RUNS/report, $RUNS/before, $RUNS/after"
