#!/usr/bin/env bash
# Train a small model with llama3 RoPE scaling, export it, read the export with transformers 4, and read the
# checkpoint with the newest JAX and Orbax.
#
# RoPE is what the two majors of transformers spell differently, so the model has more of it than the recipe gives.
# Everything is written to build/compat, which is emptied first; the environments are .venv-transformers4 and
# .venv-jax, made by make_transformers4_env.sh and make_jax_env.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=.venv/bin/python
work=build/compat

tools/ci/make_transformers4_env.sh
tools/ci/make_jax_env.sh

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

echo "the newest JAX reads the checkpoint"
"$python" tests/compat/write_expected.py --step "$work/run/checkpoints/30" --out "$work/expected.npz"
JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 .venv-jax/bin/python tests/compat/check_jax.py --readme README.md \
    --params "$work/run/checkpoints/30/params" --expected "$work/expected.npz" || status=1
exit "$status"
