#!/bin/bash
# The stages from a Hugging Face model to its evaluated long-context version: packed rows, continued pretraining, instruction tuning, export,
# evaluation. examples/laptop.sh and examples/cluster/ssh.sh run all of them, examples/cluster/job.sh one in each Slurm job. A script that
# sources this file sets RECIPE, MODEL, TEXT, ROWS, CHAT, SFT_ROWS, BOOKS, RUNS, LENGTHS, SAMPLES, SETTINGS and SFT_SETTINGS, and defines
# on_all_ranks, in_one_process and evaluation. A stage whose output exists is skipped; training resumes from its newest checkpoint.
set -euo pipefail

STOPPED=75    # exit code of a stage that saved and stopped because it was asked to; any other one but 0 is a failure

# Tokens per sequence and iterations of the two recipes, as settings change them; PYTHON is one that has this package.
read_recipes() {
    local changed
    changed=$(print_config "$RECIPE" "$SETTINGS") || exit 2
    LENGTH=$(value train.seq_length) ITERATIONS=$(value train.iterations)
    TP=$(value parallel.tp) PP=$(value parallel.pp) CP=$(value parallel.cp)
    changed=$(print_config "${RECIPE}_sft" "$SFT_SETTINGS") || exit 2
    SFT_LENGTH=$(value train.seq_length) SFT_ITERATIONS=$(value train.iterations)
    SFT_TP=$(value parallel.tp) SFT_PP=$(value parallel.pp) SFT_CP=$(value parallel.cp)
}
print_config() { "${PYTHON:-python}" tools/train.py --recipe "$1" --print-config ${2:+--set $2}; }
value() { sed -n "s/^$1=//p" <<< "$changed"; }

prepare_data() {
    mkdir -p "$RUNS"
    [ -n "$ROWS" ] || [ -f "$RUNS/text.json" ] || in_one_process python tools/prepare_data.py pretrain \
        --input $TEXT --tokenizer "$MODEL" --seq-length "$LENGTH" --output "$RUNS/text"
    [ -n "$SFT_ROWS" ] || [ -z "$CHAT" ] || [ -f "$RUNS/chat.json" ] || in_one_process python tools/prepare_data.py sft --fit single \
        --input $CHAT --tokenizer "$MODEL" --seq-length "$SFT_LENGTH" --output "$RUNS/chat"
}

check_nodes() {  # before hours of work on nodes that do not do theirs
    if [ "$CHECK" = no ] || grep -qs '"ready": true' "$RUNS/check_cluster.json"; then return 0; fi
    on_all_ranks tools/check_cluster.py --recipe "$RECIPE" ${SETTINGS:+--set $SETTINGS} --shared "$RUNS" --json "$RUNS/check_cluster.json" ||
        { echo "not started: see the verdict, or the error, above; CHECK=no skips the check" >&2; exit 1; }
}

pretrain() {  # directly at the target length
    train "$RECIPE" "$ITERATIONS" "$RUNS/pretrain" "$SETTINGS" --load-hf "$MODEL" --data "${ROWS:-$RUNS/text}"
}

instruction_tuning() {  # on short examples; RoPE is unchanged
    [ -n "$SFT_ROWS$CHAT" ] || return 0
    train "${RECIPE}_sft" "$SFT_ITERATIONS" "$RUNS/sft" "$SFT_SETTINGS" --load "$RUNS/pretrain" --data "${SFT_ROWS:-$RUNS/chat}"
}

final_checkpoints() { if [ -n "$SFT_ROWS$CHAT" ]; then echo "$RUNS/sft"; else echo "$RUNS/pretrain"; fi; }

export_model() {
    [ -d "$RUNS/hf" ] || in_one_process python tools/convert_hf.py export --load "$(final_checkpoints)" --output "$RUNS/hf" --dtype bf16
}

evaluate() {  # name of the results, --model or --load, its value
    [ -f "$RUNS/$1/niah/niah.png" ] || evaluation niah "$2" "$3" --lengths "$LENGTHS" --samples "$SAMPLES" --output "$RUNS/$1/niah"
    [ -z "$BOOKS" ] || [ -f "$RUNS/$1/perplexity/perplexity.json" ] || evaluation perplexity \
        "$2" "$3" --data $BOOKS --lengths "$LENGTHS" --output "$RUNS/$1/perplexity"
}

report() {
    in_one_process python tools/evaluate.py report --results before="$RUNS/before" after="$RUNS/after" --no-published --output "$RUNS/report"
    echo
    sed 1,2d "$RUNS/report/report.md"
    echo "model         $RUNS/hf"
    echo "checkpoints   $(final_checkpoints)"
    echo "evaluation    $RUNS/report, $RUNS/before, $RUNS/after"
}

train() {  # recipe, its iterations, run directory, settings, more arguments
    local last record="$3/metrics.jsonl" lines status=0
    last="$3/iter_$(printf %07d "$2")"
    [ ! -d "$last" ] || return 0
    lines=$(count "$record")
    on_all_ranks tools/train.py --recipe "$1" --save "$3" ${4:+--set $4} "${@:5}" || status=$?
    [ ! -d "$last" ] || return 0
    # After a request to stop torchrun's exit code is 0 if the ranks alone received it, and 1 as after a failure if torchrun did too. The
    # run's own record tells the two apart.
    if [ "$(count "$record")" -gt "$lines" ] && tail -n 1 "$record" | grep -q '"kind": *"stop".*"reason": *"asked to stop"'; then
        echo "$1 was asked to stop, and has saved; start it again to resume" >&2
        exit "$STOPPED"
    fi
    echo "$1 failed before its last iteration (exit code $status); its error is above; start it again to resume" >&2
    exit 1
}
count() { if [ -f "$1" ]; then wc -l < "$1"; else echo 0; fi; }
say() { printf '\n== %s ==\n' "$1"; }
