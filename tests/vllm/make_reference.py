"""Write what transformers generates greedily in float32, for check_export.py to hold vLLM against.

    python tests/vllm/make_reference.py --model DIR_FP32 --prompts prompts.json --out reference.json

prompts.json is a list of texts. For each of them reference.json gets `prompt_ids` (what the folder's
tokenizer makes of the text), `token_ids` (the TOKENS tokens that follow) and `margins`: at each position, the
largest logit minus the second largest, so that a reader can tell a decision from a near-tie. An
end-of-sequence token does not end the generation: every prompt gets TOKENS tokens, and check_export.py asks
vLLM for the same.

A near-tie between two experts of a mixture-of-experts layer does not show in `margins`: there the chosen
expert, and with it the token, may change for one rounding error.
"""

import argparse
import json
from pathlib import Path
from typing import TypedDict

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

TOKENS = 32  # generated for each prompt; check_export.py expects this many


class Reference(TypedDict):
    """One prompt and its greedy continuation."""

    prompt_ids: list[int]
    token_ids: list[int]
    margins: list[float]


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt_ids: list[int]) -> Reference:
    """The TOKENS most likely tokens after `prompt_ids`, one at a time, with a key-value cache."""
    step, cache = torch.tensor([prompt_ids]), None
    token_ids: list[int] = []
    margins: list[float] = []
    while len(token_ids) < TOKENS:
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        (first, second), (token, _) = (top.tolist() for top in output.logits[0, -1].topk(2))
        token_ids.append(token)
        margins.append(first - second)
        step = torch.tensor([[token]])
    return {"prompt_ids": prompt_ids, "token_ids": token_ids, "margins": margins}


def main() -> None:
    """Read the command line, generate, write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a model folder; it is loaded in float32")
    parser.add_argument("--prompts", type=Path, required=True, help="a JSON list of texts")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    references = [greedy(model, tokenizer(text).input_ids) for text in json.loads(args.prompts.read_text())]
    args.out.write_text(json.dumps(references))
    near_ties = sum(margin < 1e-4 for reference in references for margin in reference["margins"])
    print(f"{args.out}: {len(references)} prompts, {TOKENS} tokens each, {near_ties} margins below 1e-4")


if __name__ == "__main__":
    main()
