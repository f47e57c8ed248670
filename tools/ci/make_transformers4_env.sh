#!/usr/bin/env bash
# Build the environment with transformers 4:
# make_transformers4_env.sh [ENV_DIR], by default .venv-transformers4 here.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
exec "$root/tools/ci/make_env.sh" "${1:-$root/.venv-transformers4}" \
    "$root/requirements/compat-transformers4.txt" \
    --name "transformers 4" --target test-compat --import transformers
