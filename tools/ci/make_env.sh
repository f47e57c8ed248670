#!/usr/bin/env bash
# Build one side environment from one requirements file, or do nothing if it is already built from that file.
#
#   make_env.sh ENV_DIR REQUIREMENTS --name NAME --target TARGET --import MODULE [--no-deps PACKAGE]
#
#   --name     what the environment holds, for messages ("vLLM")
#   --target   the make target that needs it, for messages ("test-vllm")
#   --import   a module that must import before the environment counts as built
#   --no-deps  a package listed in REQUIREMENTS that is installed first and without its own requirements
#
# PYTHON (default python3) names the interpreter. The environment is stamped last, with a hash of what it was
# built from, so that an interrupted build is never taken for a finished one. pip's output is kept in
# ENV_DIR/pip.log. Exit status: 0 built or already there, 1 could not be built (one plain line says why),
# 2 called wrongly.
set -euo pipefail

usage() {
    sed -n 's/^#   make_env.sh/usage: make_env.sh/p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

[[ $# -ge 2 ]] || usage
env_dir=$1
requirements=$2
shift 2
name='' target='' module='' no_deps=''
while [[ $# -gt 0 ]]; do
    [[ $# -ge 2 ]] || usage
    case $1 in
        --name) name=$2 ;;
        --target) target=$2 ;;
        --import) module=$2 ;;
        --no-deps) no_deps=$2 ;;
        *) usage ;;
    esac
    shift 2
done
[[ -n $name && -n $target && -n $module ]] || usage
[[ -f $requirements ]] || { echo "make_env.sh: there is no requirements file $requirements" >&2; exit 2; }

python=${PYTHON:-python3}
stamp=$env_dir/.built-from
log=$env_dir/pip.log

give_up() { # REASON
    echo "$name could not be installed here: $1, so \`make $target\` did not run"
    exit 1
}

version=$("$python" -VV 2>&1) || give_up "$python does not run"
fingerprint=$({ cat "$requirements"; printf '%s\n' "$no_deps" "$version"; } | sha256sum | cut -d ' ' -f 1)
if [[ -f $stamp && $(<"$stamp") == "$fingerprint" ]]; then
    exit 0
fi

# An existing folder is emptied below, so it has to be an environment.
if [[ -e $env_dir && ! -f $env_dir/pyvenv.cfg && -n $(ls -A "$env_dir" 2>&1) ]]; then
    give_up "$env_dir exists and is not a Python environment"
fi

# The package installed without its requirements, and all the others.
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
: >"$parts/alone.txt"
cp "$requirements" "$parts/rest.txt"
if [[ -n $no_deps ]]; then
    grep -E "^$no_deps *[=<>~]" "$requirements" >"$parts/alone.txt" ||
        { echo "make_env.sh: $requirements does not list $no_deps" >&2; exit 2; }
    grep -vE "^$no_deps *[=<>~]" "$requirements" >"$parts/rest.txt"
fi

started=$SECONDS
echo "installing $name from $requirements into $env_dir"
mkdir -p "$env_dir"
"$python" -m venv --clear "$env_dir" || give_up "$python cannot make a virtual environment"

pip_install() {
    "$env_dir/bin/python" -m pip install --progress-bar off --no-input "$@" >>"$log" 2>&1 ||
        give_up "$(grep -m 1 '^ERROR: ' "$log" || echo "pip failed") (all of pip's output is in $log)"
}

[[ ! -s $parts/alone.txt ]] || pip_install --no-deps -r "$parts/alone.txt"
pip_install -r "$parts/rest.txt"
"$env_dir/bin/python" -c "import $module" >>"$log" 2>&1 ||
    give_up "\`import $module\` fails after the install: $(tail -n 1 "$log") (see $log)"
printf '%s\n' "$fingerprint" >"$stamp"
echo "$name is installed in $env_dir ($((SECONDS - started)) s)"
