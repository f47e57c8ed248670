"""Answer a run's problems in a real vLLM on CPU, and hold the score against the one that the run reports.

    python tests/vllm/check_score.py --run RUN --problems FILE.jsonl --count N --max-new-tokens N

It runs in the environment that tools/ci/make_vllm_env.sh builds, without tptrain. RUN holds journal.jsonl and
export/, in float32; the problems are the first N lines of GSM8K's file, which the run answered after
training. vLLM gets their texts, generates greedily, and stops where the export's generation_config.json says.
An answer counts by GSM8K's own rule. One line is JSON with both scores. Exit status: 0 equal, 1 not, or
none is right.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PROMPT = "Question: {}\nAnswer:"  # of the preset gsm8k


def final_answer(text: str) -> str | None:
    found = re.search(r"#### (-?[0-9.,]+)", text)
    return found[1].replace(",", "") if found else None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--problems", type=Path, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--max-new-tokens", type=int, required=True)
    args = parser.parse_args()

    from vllm import LLM, SamplingParams

    with args.problems.open(encoding="utf-8") as lines:
        problems = [json.loads(line) for line, _ in zip(lines, range(args.count), strict=False)]
    model = LLM(model=str(args.run / "export"), dtype="float32", max_model_len=512, enforce_eager=True)
    prompts = [PROMPT.format(problem["question"]) for problem in problems]
    greedy = SamplingParams(temperature=0.0, max_tokens=args.max_new_tokens)
    texts = [output.outputs[0].text for output in model.generate(prompts, greedy)]
    pairs = zip(texts, problems, strict=True)
    right = sum(final_answer(text) == final_answer(problem["answer"]) for text, problem in pairs)
    print(json.dumps({"vllm": right / len(problems), "run": scored(args.run / "journal.jsonl")}))
    return 0 if right and right / len(problems) == scored(args.run / "journal.jsonl") else 1


def scored(journal: Path) -> float:
    """The exact match that the last evaluation of a run reports."""
    events = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    scores = [event["metrics"]["exact_match"] for event in events if event.get("metrics")]
    return float(scores[-1])


if __name__ == "__main__":
    sys.exit(main())
