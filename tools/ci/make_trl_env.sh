#!/usr/bin/env bash
# Build the environment of TRL, for benchmarks beside it: make_trl_env.sh [ENV_DIR], by default .venv-trl here.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
exec "$root/tools/ci/make_env.sh" "${1:-$root/.venv-trl}" "$root/requirements/trl.txt" \
    --name TRL --target bench-data --import trl
