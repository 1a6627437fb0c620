#!/bin/bash
# Both data sets, for pretraining and instruction tuning, prepared on a laptop in about a minute, without a network, from text that comes with
# Python. The stages are those that examples/ultralong_data.sh runs on public sources. A stage whose output exists is skipped.
#   bash examples/laptop_data.sh
# With a model behind an OpenAI-compatible endpoint, answers are refined as well:
#   BASE_URL=http://localhost:8000/v1 MODEL=... bash examples/laptop_data.sh
set -euo pipefail

# Relative paths are those of the folder this is called from.
for name in TOKENIZER OUT; do [ -z "${!name:-}" ] || declare "$name=$(realpath -m "${!name}")"; done
OUT=${OUT:-runs/laptop_data}
MIB=${MIB:-3}                   # of the standard library's modules
SEQ_LENGTH=${SEQ_LENGTH:-64K}
TOKENS=${TOKENS:-2_000_000}     # of the pretraining set
EXAMPLES=${EXAMPLES:-300}       # conversations of the instruction data
TOKENIZER=${TOKENIZER:-}        # Hugging Face directory with a chat template; empty = the demo's
BASE_URL=${BASE_URL:-}
MODEL=${MODEL:-}
REFINE=${REFINE:-20}            # conversations of each source that are refined

cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
RAW="$OUT/raw"
TOKENIZER=${TOKENIZER:-$RAW/tokenizer}
BENCHMARKS=("text=$RAW/benchmark.jsonl")

# Raw data. The tokenizer is written last.
[ -d "$RAW/tokenizer" ] || python examples/laptop_data.py "$RAW" --mib "$MIB"

# 1. Documents, with the text that they share with the benchmark cut out.
[ -f "$OUT/text/report.json" ] || python tools/prepare_data.py decontaminate --input "$RAW"/text/*.* "$RAW"/text/packages/*.txt \
    --benchmark "${BENCHMARKS[@]}" --action cut --margin 20 --output "$OUT/text"

# 2. Documents to rows: a mix of sources and lengths in which short documents are used less often and long ones more often. In one data
#    set documents continue in the next row, in the other they are kept whole where they fit.
cat > "$OUT/text.yaml" <<EOF
tokens: $TOKENS
rates: {<4K: 0.25, 4K-8K: 1, ">=8K": 3}
sources:
  library:   {input: text/library.jsonl.zst, weight: 0.7, id_key: id}
  reference: {input: text/reference.parquet, weight: 0.1, id_key: topic}
  packages:  {input: text/*.txt, weight: 0.2}
EOF
[ -f "$OUT/rows.json" ] || python tools/prepare_data.py pretrain --sources "$OUT/text.yaml" --tokenizer "$TOKENIZER" --seq-length "$SEQ_LENGTH" \
    --duplicates drop --tokens-dir "$OUT/tokens" --output "$OUT/rows"
[ -f "$OUT/rows_best.json" ] || python tools/prepare_data.py pretrain --sources "$OUT/text.yaml" --tokenizer "$TOKENIZER" \
    --seq-length "$SEQ_LENGTH" --fit best --document-starts --duplicates drop --tokens-dir "$OUT/tokens" --output "$OUT/rows_best"

# 3. Conversations in three published formats: refined if a model is given, then without those that match the benchmark.
CHAT=("$RAW"/chat/{modules.json,functions.jsonl,numbers.parquet})
if [ -n "$MODEL" ]; then
    refine() {  # name, file, domain
        [ -f "$OUT/refined/$1.jsonl" ] || python tools/prepare_data.py refine --input "$RAW/chat/$2" --domain "$3" --model "$MODEL" \
            ${BASE_URL:+--base-url "$BASE_URL"} --examples "$REFINE" --output "$OUT/refined/$1.jsonl"
    }
    refine modules modules.json general
    refine functions functions.jsonl code
    refine numbers numbers.parquet math
    CHAT=("$OUT"/refined/{modules,functions,numbers}.jsonl)
fi
[ -f "$OUT/chat/report.json" ] || python tools/prepare_data.py decontaminate --input "${CHAT[@]}" --form auto \
    --benchmark "${BENCHMARKS[@]}" --output "$OUT/chat"

# 4. Conversations to rows, one per row; loss on the answers.
cat > "$OUT/chat.yaml" <<EOF
sources:
  modules:   {input: chat/modules.jsonl, domain: general}
  functions: {input: chat/functions.jsonl, domain: code}
  numbers:   {input: chat/numbers.jsonl, domain: math}
EOF
if [ ! -f "$OUT/sft.json" ]; then
    python tools/prepare_data.py sft --input "$OUT/chat/numbers.jsonl" --tokenizer "$TOKENIZER" --show 1 | sed -n 1,30p  # * = trained on
    python tools/prepare_data.py sft --sources "$OUT/chat.yaml" --tokenizer "$TOKENIZER" --examples "$EXAMPLES" \
        --mix general=0.2,code=0.6,math=0.2 --fit single --output "$OUT/sft"
fi

echo "rows: $OUT/rows, $OUT/rows_best and $OUT/sft (.bin, .idx; .json describes the content)"
echo "plots: $OUT/rows.lengths.png, $OUT/rows_best.lengths.png; reports: $OUT/text/report.json, $OUT/chat/report.json"
