#!/usr/bin/env bash
# Build the environment with the newest JAX and Orbax: make_jax_env.sh [ENV_DIR], by default .venv-jax here.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
exec "$root/tools/ci/make_env.sh" "${1:-$root/.venv-jax}" "$root/requirements/compat-jax.txt" \
    --name "the newest JAX" --target test-compat --import orbax.checkpoint
