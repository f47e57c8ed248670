#!/usr/bin/env bash
# Train a small model on GSM8K, export it, and hold the export in a real vLLM against transformers; the same
# for adapters trained over it. Then the whole way of a run that learns a few problems by heart: its rows on a page,
# packed training, scores before and after, an export that requires them, and the same score from vLLM. Last a small
# model of every family: its export bit for bit, and the tokens that vLLM serves.
#
# TPTRAIN_GSM8K names the folder with GSM8K's train.jsonl and test.jsonl. Everything is written to build/vllm,
# which is emptied first; the environment with vLLM is .venv-vllm, made by make_vllm_env.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=.venv/bin/python
work=build/vllm

gsm8k=${TPTRAIN_GSM8K:-}
if [[ -z $gsm8k || ! -f $gsm8k/train.jsonl || ! -f $gsm8k/test.jsonl ]]; then
    echo "TPTRAIN_GSM8K=$gsm8k: must name the folder with GSM8K's train.jsonl and test.jsonl" >&2
    exit 1
fi

tools/ci/make_vllm_env.sh

rm -rf "$work"
mkdir -p "$work"
.venv/bin/tptrain train recipes/tiny_gsm8k.py data.path="$gsm8k/train.jsonl" output_dir="$work/run" \
    precision.compute=float32 schedule.max_steps=120 save.every_steps=0
"$python" tools/convert_ckpt.py "$work/run" "$work/float32" --dtype float32

"$python" - "$gsm8k/test.jsonl" "$work/prompts.json" <<'PYTHON'
"""20 questions that the model has not seen, as its preset words them."""
import json
import sys

from tptrain.data.records import PRESETS

test_file, out = sys.argv[1:]
with open(test_file, encoding="utf-8") as lines:
    questions = [json.loads(line)["question"] for line, _ in zip(lines, range(20))]
with open(out, "w", encoding="utf-8") as file:
    json.dump([PRESETS["gsm8k"].prompt.format(question) for question in questions], file)
PYTHON

"$python" tests/vllm/make_reference.py --model "$work/float32" --prompts "$work/prompts.json" \
    --out "$work/reference.json"
.venv-vllm/bin/python tests/vllm/check_export.py --export "$work/run/export" --float32-export "$work/float32" \
    --prompts "$work/prompts.json" --reference "$work/reference.json"

# Adapters over that export, whose weights bfloat16 holds exactly: served beside it as they are, and merged.
.venv/bin/tptrain train recipes/tiny_gsm8k.py data.path="$gsm8k/train.jsonl" output_dir="$work/lora" \
    model.pretrained="$work/run/export" model.tokenizer=pretrained precision.compute=float32 lora.rank=8 \
    export.lora=adapter export.dtype=float32 schedule.max_steps=60 save.every_steps=0
"$python" tools/convert_ckpt.py "$work/lora" "$work/merged" --dtype float32
"$python" tests/vllm/make_reference.py --model "$work/merged" --prompts "$work/prompts.json" \
    --out "$work/merged.json"
.venv-vllm/bin/python tests/vllm/check_adapter.py --base "$work/run/export" --adapter "$work/lora/export" \
    --reference "$work/merged.json"

# So small a model solves no problem that it has not seen, so it is asked those that it was trained on.
data=(data.path="$gsm8k/train.jsonl" data.max_records=16 data.packing=best_fit data.seq_len=512)
.venv/bin/tptrain data inspect recipes/tiny_gsm8k.py "${data[@]}" --rows 2 --html "$work/rows.html"
.venv/bin/tptrain train recipes/tiny_gsm8k.py "${data[@]}" data.batch_rows=2 output_dir="$work/learnt" \
    schedule.max_steps=200 eval.path="$gsm8k/train.jsonl" eval.problems=16 eval.batch_rows=16 \
    eval.max_new_tokens=200 export.require="exact_match>before,exact_match>=0.5" \
    precision.compute=float32 export.dtype=float32 save.every_steps=0
.venv-vllm/bin/python tests/vllm/check_score.py --run "$work/learnt" --problems "$gsm8k/train.jsonl" \
    --count 16 --max-new-tokens 200

"$python" tools/bench/families.py --vllm .venv-vllm/bin/python --work "$work/families" --only-served
