"""Greedy tokens of a small model of every family in a real vLLM on CPU, held against transformers'.

    python tests/vllm/check_families.py DIR

It runs in the environment that tools/ci/make_vllm_env.sh builds. Each folder DIR/<family> has a model folder
`export` in float32 and a `reference.json` as make_reference.py writes it; tools/bench/families.py makes them.
Comparison and near-ties are as in check_export.py.

Every problem is printed on a line of its own; a family that vLLM cannot load is one of them. The last line is
JSON: family -> whether all its tokens are equal, how many were compared, and the reason if it was not served.
Exit status: 0 no problem, 1 some.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from check_export import MIN_COMPARED, TOKENS, Reference, compare, generate_in_child


def check(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The counts and the problems of one family."""
    references: list[Reference] = json.loads((folder / "reference.json").read_text())
    prompts = [reference["prompt_ids"] for reference in references]
    longest = max(len(ids) for ids in prompts) + TOKENS
    try:
        generated = generate_in_child(folder / "export", "float32", prompts, longest)
    except SystemExit as error:
        return {"tokens_equal": False, "not_served": str(error)}, [f"{folder.name}: {error}"]
    compared, equal, problems = compare(generated, references)
    if not problems and compared < MIN_COMPARED * TOKENS * len(references):
        problems.append(f"only {compared} of {TOKENS * len(references)} tokens before a near-tie")
    counts = {"tokens_equal": not problems and equal == compared, "tokens_compared": compared}
    return counts, [f"{folder.name}: {problem}" for problem in problems]


def main() -> int:
    """Read the command line, check each folder, print the problems and the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder with one folder per family")
    args = parser.parse_args()
    found, problems = {}, list[str]()
    for path in sorted(args.folder.glob("*/reference.json")):
        found[path.parent.name], more = check(path.parent)
        problems += more
    if not found:
        problems.append(f"{args.folder} holds no folder with a reference.json")
    print(*problems, json.dumps(found), sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
