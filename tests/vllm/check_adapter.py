"""Serve an adapter in a real vLLM on CPU, and hold it against transformers with the adapter merged.

    python tests/vllm/check_adapter.py --base DIR --adapter PEFT_DIR --reference reference.json

It runs in the environment that tools/ci/make_vllm_env.sh builds. DIR is the model that the adapter was
trained on, with weights that bfloat16 holds exactly, as training held them; reference.json is what
make_reference.py writes for the merged model in float32. vLLM computes in float32; comparison and near-ties
are as in check_export.py. Without the adapter the same model must generate something else, or the check says
nothing.

Every problem is printed on a line of its own. The last line is JSON with the counts. Exit status: 0 no
problem, 1 some.
"""

import argparse
import json
import sys
from pathlib import Path

from check_export import MIN_COMPARED, TOKENS, Reference, compare, generate_in_child


def main() -> int:
    """Read the command line, generate with and without the adapter, print problems and counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="the model folder below the adapter")
    parser.add_argument(
        "--adapter", type=Path, required=True, help="the exported adapter, of rank 16 or less"
    )
    parser.add_argument(
        "--reference", type=Path, required=True, help="make_reference.py's of the merged model"
    )
    args = parser.parse_args()

    references: list[Reference] = json.loads(args.reference.read_text())
    prompts = [reference["prompt_ids"] for reference in references]
    longest = max(len(ids) for ids in prompts) + TOKENS
    adapted = generate_in_child(args.base, "float32", prompts, longest, args.adapter)
    alone = generate_in_child(args.base, "float32", prompts, longest)

    total = TOKENS * len(references)
    compared, equal, problems = compare(adapted, references)
    if not problems and compared < MIN_COMPARED * total:
        problems.append(f"only {compared} of {total} tokens could be compared before a near-tie")
    changed = sum(one.token_ids != other.token_ids for one, other in zip(adapted, alone, strict=True))
    if not changed:
        problems.append("the adapter changes no token, so serving it is not tested")
    counts = {"tokens_total": total, "tokens_compared": compared, "tokens_equal": equal}
    print(*problems, json.dumps({**counts, "prompts_changed": changed}), sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
