#!/bin/bash
# Both data sets of arXiv 2504.06214 again from public sources: documents to rows of 1M, 2M or 4M tokens, conversations to rows of 8K.
# Sources, what is known of each and its licence: docs/data-sources.md; read the licences first, some forbid commercial use. A stage
# whose output is there is not run again; one that was stopped goes on. examples/laptop_data.sh is the same in small, without a network.
#   bash examples/ultralong_data.sh             some 15 GB to download and 100 GB of disk, by estimate
# Then, in examples/ultralong_1m.sh:  ROWS=data/ultralong/rows_1m  SFT_ROWS=data/ultralong/sft
# With answers refined by a model behind an OpenAI-compatible endpoint, as the paper's are by GPT-4o and GPT-4o-mini:
#   MODEL=gpt-4o-mini bash examples/ultralong_data.sh
#   BASE_URL=http://localhost:8000/v1 MODEL=Qwen/Qwen2.5-72B-Instruct bash examples/ultralong_data.sh
set -euo pipefail

SIZE=${SIZE:-1M}                                     # tokens of a row: 1M, 2M or 4M
TOKENIZER=${TOKENIZER:-models/Llama-3.1-8B-Instruct} # Hugging Face directory of the model
DATA=${DATA:-data/ultralong}
EXAMPLES=${EXAMPLES:-100000}                         # conversations
MIX=${MIX:-general=0.5,math=0.25,code=0.25}          # this project's own choice; the paper does not say
BASE_URL=${BASE_URL:-}                               # empty = OpenAI's
MODEL=${MODEL:-}                                     # empty = answers stay as they are
REFINE_EACH=${REFINE_EACH:-12000}                    # the first so many conversations of each source are refined, and no others used then
# What the evaluations ask. RULER is made by a program: once it is there, add ruler=FOLDER.
BENCHMARKS=${BENCHMARKS:-mmlu=hub mmlu_pro=hub math=hub gsm8k=hub humaneval=hub lveval=hub infinitebench=hub}

cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

# A data set's files that match a glob, into a folder that appears when they are all there.
download() {  # folder, data set on the hub, glob
    [ ! -d "$1" ] || return 0
    hf download "$2" --repo-type dataset --include "$3" --local-dir "$1.partial"
    rm -rf "$1.partial/.cache"
    [ -n "$(find "$1.partial" -type f)" ] || { echo "$2 has no file $3; it may have changed since docs/data-sources.md was written" >&2; exit 1; }
    # JSON lines, whatever their name says.
    find "$1.partial" -name '*.json.gz' -exec sh -c 'mv "$1" "${1%.json.gz}.jsonl.gz"' _ {} \;
    mv "$1.partial" "$1"
}

# ---- documents -------------------------------------------------------------------------------------------------

# What they share with the benchmarks is cut out with 40 words around it: one chance match must not cost a whole book.
text() {  # name, data set, glob
    download "$DATA/text/raw/$1" "$2" "$3"
    [ -f "$DATA/text/clean/$1/report.json" ] || python tools/prepare_data.py decontaminate --input "$DATA/text/raw/$1"/*.jsonl.gz \
        --benchmark $BENCHMARKS --action cut --margin 40 --output "$DATA/text/clean/$1"
}
text web    common-pile/cccc_filtered              "dolma-cccc-filtered-000[0-5].json.gz"
text code   common-pile/stackv2_edu_filtered       "stack-edu-000[0-1].json.gz"
text papers common-pile/arxiv_papers_filtered      "arxiv-papers-000[0-1].json.gz"
text books  common-pile/project_gutenberg_filtered "project_gutenberg-dolma-0000.json.gz"

# The tokens of all documents are kept, for rows of another length or in another mix.
ROWS="$DATA/rows_${SIZE,,}"
cp examples/ultralong_text.yaml "$DATA/text.yaml"
[ -f "$ROWS.json" ] || python tools/prepare_data.py pretrain --sources "$DATA/text.yaml" --tokenizer "$TOKENIZER" --seq-length "$SIZE" \
    --duplicates drop --tokens-dir "$DATA/tokens" --output "$ROWS"

# ---- conversations ---------------------------------------------------------------------------------------------

# Refined first, so that what the model wrote is searched for the benchmarks too.
chat() {  # name, domain, data set, glob
    download "$DATA/chat/raw/$1" "$3" "$4"
    local input="$DATA/chat/raw/$1"
    if [ -n "$MODEL" ]; then
        [ -f "$DATA/chat/refined/$1.jsonl" ] || python tools/prepare_data.py refine --input "$input" --domain "$2" --model "$MODEL" \
            ${BASE_URL:+--base-url "$BASE_URL"} --limit "$REFINE_EACH" --output "$DATA/chat/refined/$1.jsonl"
        input="$DATA/chat/refined/$1.jsonl"
    fi
    [ -f "$DATA/chat/clean/$1/report.json" ] || python tools/prepare_data.py decontaminate --input "$input" --form auto \
        --benchmark $BENCHMARKS --output "$DATA/chat/clean/$1"
}
chat share_gpt      general anon8231489123/ShareGPT_Vicuna_unfiltered    "ShareGPT_V3_unfiltered_cleaned_split.json"
chat slim_orca      general Open-Orca/SlimOrca                           "*.jsonl"
chat evol_instruct  general WizardLMTeam/WizardLM_evol_instruct_V2_196k  "*.json"
chat gpteacher      general teknium/GPTeacher-General-Instruct           "gpt4-instruct-dedupe-only-dataset.json"
chat alpaca_gpt4    general vicgalle/alpaca-gpt4                         "data/*.parquet"
chat ultra_interact general openbmb/UltraInteract_sft                    "*.parquet"
chat orca_math      math    microsoft/orca-math-word-problems-200k       "data/*.parquet"
chat math_instruct  math    TIGER-Lab/MathInstruct                       "*.json"
chat meta_math      math    meta-math/MetaMathQA                         "MetaMathQA-395K.json"
chat magicoder      code    ise-uiuc/Magicoder-OSS-Instruct-75K          "*.jsonl"
chat wizard_coder   code    nickrosh/Evol-Instruct-Code-80k-v1           "*.json"
chat glaive         code    glaiveai/glaive-code-assistant               "*.json"

# One conversation a row: the batch of 128 rows that the recipes read is the paper's batch of 128 examples.
cp examples/ultralong_chat.yaml "$DATA/chat.yaml"
[ -f "$DATA/sft.json" ] || python tools/prepare_data.py sft --sources "$DATA/chat.yaml" --tokenizer "$TOKENIZER" --seq-length 8K \
    --examples "$EXAMPLES" --mix "$MIX" --fit single --output "$DATA/sft"

echo "rows of $SIZE: $ROWS; instruction data: $DATA/sft"
