#!/usr/bin/env bash
# Train a small model with llama3 RoPE scaling, export it, and read the export with transformers 4.
#
# RoPE is what the two majors spell differently, so the model has more of it than the recipe gives. Everything is
# written to build/compat, which is emptied first; transformers 4 is in .venv-transformers4, made by
# make_transformers4_env.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=.venv/bin/python
work=build/compat

tools/ci/make_transformers4_env.sh

rm -rf "$work"
mkdir -p "$work"
rope='{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
       "original_max_position_embeddings": 64}'
.venv/bin/tptrain train recipes/tiny_word_problems.py output_dir="$work/run" schedule.max_steps=30 \
    schedule.warmup_steps=5 data.batch_rows=16 eval.problems=0 model.config.rope_theta=20000.0 \
    model.config.rope_scaling="$rope"
"$python" tools/convert_ckpt.py "$work/run" "$work/float32" --dtype float32

status=0
for export in "$work/run/export" "$work/float32"; do
    echo "transformers 4 reads $export"
    "$python" tests/compat/make_logits.py --export "$export" --logits "$work/logits.safetensors" \
        --sample "$work/sample.json"
    .venv-transformers4/bin/python tests/compat/check_transformers4.py --export "$export" \
        --logits "$work/logits.safetensors" --sample "$work/sample.json" || status=1
done
exit "$status"
