#!/bin/bash
# The complete pipeline on a laptop's CPU: the demo's model (examples/demo/base, 512 tokens of context) in, continued pretraining at 4,096
# tokens on two context parallel ranks, instruction tuning on short conversations, export, evaluation before and after. Takes 10 minutes of
# CPU time (2 cores of an AMD EPYC, 2026-11-29).
# The stages are those of the paper's runs on a cluster (examples/cluster): the same file, examples/stages.sh.
#   bash examples/laptop.sh      when run again it resumes where it was stopped
set -euo pipefail
# Relative paths are those of the folder this is called from.
for name in RUNS; do [ -z "${!name:-}" ] || declare "$name=$(realpath -m "${!name}")"; done
cd "$(dirname "$0")/.."

RECIPE=tiny_extend                         # and ${RECIPE}_sft for instruction tuning
RUNS=${RUNS:-runs/laptop}
MODEL=$RUNS/base                           # Hugging Face directory, read in place
TEXT=$RUNS/raw/text.jsonl                  # raw documents
ROWS=
CHAT=$RUNS/raw/chat.jsonl                  # conversations
SFT_ROWS=
BOOKS=$RUNS/raw/held_out.jsonl             # documents for perplexity
LENGTHS=${LENGTHS:-512,1K,2K,4K}           # of passkey grid and perplexity
SAMPLES=5
SETTINGS="runtime.device=cpu ${SETTINGS:-train.iterations=30}"    # of both recipes; half of their iterations suffice
SFT_SETTINGS=$SETTINGS
DOCUMENTS=${DOCUMENTS:-120}
CONVERSATIONS=${CONVERSATIONS:-500}

export OMP_NUM_THREADS=1
on_all_ranks() { torchrun --standalone --nproc-per-node 2 "$@"; }
in_one_process() { "$@"; }
evaluation() { python tools/evaluate.py "$1" "${@:2}"; }    # plain transformers

# The base model has no chat template; its instruction-tuned version gets this one.
if ! mkdir -p "$RUNS" 2> /dev/null || [ ! -w "$RUNS" ]; then
    echo "error: RUNS=$RUNS: no folder that can be written; give another" >&2
    exit 2
fi
if [ ! -f "$MODEL/chat_template.jinja" ]; then
    cp -r examples/demo/base "$RUNS"
    cat > "$MODEL/chat_template.jinja" <<'TEMPLATE'
{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% else %}Question: {{ message.content }}
{% endif %}{% endfor %}
TEMPLATE
fi
raw() { [ -f "$4" ] || python examples/demo/corpus.py "$1" --tokenizer "$MODEL" --length "$2" --rows "$3" --output "$4" "${@:5}"; }
raw documents 4K "$DOCUMENTS" "$TEXT" --list 0 --seed 1
raw documents 5K 8 "$BOOKS" --list 0 --seed 2
raw conversations 400 "$CONVERSATIONS" "$CHAT" --seed 3

source examples/stages.sh
read_recipes

say "1. documents, and conversations, to packed rows of S + 1 tokens"
prepare_data
say "2. continued pretraining, directly at the target length"
pretrain
say "3. instruction tuning on short examples; RoPE is unchanged"
instruction_tuning
say "4. export to a Hugging Face directory"
export_model
say "5. passkey grid and perplexity, before and after"
evaluate before --model "$MODEL"
evaluate after --model "$RUNS/hf"
report
