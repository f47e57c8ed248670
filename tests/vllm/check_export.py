"""Load an exported folder in a real vLLM on CPU and hold it against transformers, token by token.

Run it with the python of the environment that tools/ci/make_vllm_env.sh builds:

    python tests/vllm/check_export.py --export DIR_BF16 --float32-export DIR_FP32 \
        --prompts prompts.json --reference reference.json

1. DIR_FP32 in float32, from the reference's prompt ids: greedy tokens must equal the reference's, prompt by
   prompt, up to the first position where the reference's two best logits lie within NEAR_TIE of each other.
   From there on two right programs may part. At least MIN_COMPARED of all tokens must have been compared, or
   the check says nothing.
2. DIR_BF16 in bfloat16, from the texts: vLLM must make the reference's prompt ids of each text, and must
   generate.

End-of-sequence tokens do not end a generation, neither here (`ignore_eos`) nor in make_reference.py: every
prompt gets TOKENS tokens, so 20 prompts give 640 to compare however soon the model would have stopped. Stop
tokens are therefore not tested by this script.

Every problem is printed on a line of its own. The last line is JSON with the counts, whether or not there
were any; only a folder that vLLM cannot load ends the check before that. Exit status: 0 no problem, 1 some.
"""

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TypedDict

TOKENS = 32  # generated for each prompt, as in make_reference.py
NEAR_TIE = 1e-4  # in logits; float32 noise between two implementations is near 1e-5 when logits are near 10
MIN_COMPARED = 0.9  # of all tokens
MAX_LORA_RANK = 16  # vLLM takes some powers of 2

VLLM_SETTINGS = {
    # The engine runs inside the process that asks for it. By default it runs in two more, and those keep a
    # child of multiprocessing from ever ending: it waits for them before vLLM gets to stop them.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Reference(TypedDict):
    """One prompt and its greedy continuation, as make_reference.py writes it."""

    prompt_ids: list[int]
    token_ids: list[int]
    margins: list[float]


@dataclass(frozen=True)
class Generated:
    """What vLLM took a prompt to be and how it went on."""

    prompt_ids: list[int]
    token_ids: list[int]


def generate(
    folder: str,
    dtype: str,
    prompts: list[str] | list[list[int]],
    max_model_len: int,
    adapter: str | None = None,
) -> list[Generated]:
    """Generate greedily with vLLM from texts or from token ids; call it in a process of its own.

    adapter: a PEFT folder that is served on top of the model.
    """
    os.environ.update(VLLM_SETTINGS)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    has_tokenizer = (Path(folder) / "tokenizer_config.json").is_file()
    llm = LLM(
        model=folder,
        dtype=dtype,
        max_model_len=max_model_len,
        enforce_eager=True,
        seed=0,
        skip_tokenizer_init=not has_tokenizer,
        enable_lora=adapter is not None,
        max_lora_rank=MAX_LORA_RANK,
    )
    on_top = LoRARequest("adapter", 1, adapter) if adapter is not None else None
    inputs = [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in prompts]
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=has_tokenizer)
    outputs = llm.generate(inputs, greedy, use_tqdm=False, lora_request=on_top)
    return [Generated(list(output.prompt_token_ids), list(output.outputs[0].token_ids)) for output in outputs]


def generate_in_child(
    folder: Path,
    dtype: str,
    prompts: list[str] | list[list[int]],
    max_model_len: int,
    adapter: Path | None = None,
) -> list[Generated]:
    """`generate` in a fresh process, so that two models never share memory, threads or environment."""
    if not (folder / "config.json").is_file():
        raise SystemExit(f"{folder} is not a model folder: it has no config.json")
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as child:
        try:
            on_top = str(adapter) if adapter is not None else None
            return child.submit(generate, str(folder), dtype, prompts, max_model_len, on_top).result()
        except Exception as error:  # whatever stops vLLM means that the folder cannot be served
            reason = f"{type(error).__name__}: {error}"
            raise SystemExit(f"vLLM cannot serve {folder} in {dtype}: {reason}") from error


def wrong_count(dtype: str, index: int, ours: Generated) -> str:
    """The problem with a prompt that did not get TOKENS tokens."""
    return f"{dtype}, prompt {index}: vLLM generated {len(ours.token_ids)} tokens, not {TOKENS}"


def compare(generated: list[Generated], references: list[Reference]) -> tuple[int, int, list[str]]:
    """Hold the float32 tokens against the reference.

    Returns how many tokens were compared, how many of them were equal, and one problem for each prompt that
    differs. A prompt is not followed past its first difference: what comes after it has another prefix.
    """
    compared, equal, problems = 0, 0, []
    for index, (ours, reference) in enumerate(zip(generated, references, strict=True)):
        if len(ours.token_ids) != TOKENS:
            problems.append(wrong_count("float32", index, ours))
            continue
        expected = zip(ours.token_ids, reference["token_ids"], reference["margins"], strict=True)
        for position, (token, wanted, margin) in enumerate(expected):
            if margin < NEAR_TIE:
                break
            compared += 1
            if token != wanted:
                problems.append(
                    f"float32, prompt {index}, position {position}: vLLM generated token {token},"
                    f" transformers {wanted}, which leads the next best by {margin:.3g} in logits"
                )
                break
            equal += 1
    return compared, equal, problems


def check_text(generated: list[Generated], references: list[Reference]) -> list[str]:
    """Problems with what vLLM made of the texts in bfloat16: other prompt ids, or too few tokens."""
    problems = []
    for index, (ours, reference) in enumerate(zip(generated, references, strict=True)):
        if ours.prompt_ids != reference["prompt_ids"]:
            pairs = enumerate(zip_longest(ours.prompt_ids, reference["prompt_ids"]))
            position, (token, wanted) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
            problems.append(
                f"bfloat16, prompt {index}: vLLM reads the text as {len(ours.prompt_ids)} tokens,"
                f" transformers as {len(reference['prompt_ids'])};"
                f" at position {position} they read {token} and {wanted}"
            )
        if len(ours.token_ids) != TOKENS:
            problems.append(wrong_count("bfloat16", index, ours))
    return problems


def check_inputs(prompts: list[str], references: list[Reference]) -> list[str]:
    """Problems with the two input files, which would make the comparison meaningless."""
    if not prompts or len(prompts) != len(references):
        return [f"{len(prompts)} prompts but {len(references)} references; both must be the same and not 0"]
    return [
        f"reference {index} has {len(reference['token_ids'])} tokens and {len(reference['margins'])} margins,"
        f" not {TOKENS} of each; write it again with make_reference.py"
        for index, reference in enumerate(references)
        if not len(reference["token_ids"]) == len(reference["margins"]) == TOKENS
    ]


def main() -> int:
    """Read the command line, run both checks, print the problems and the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--export", type=Path, required=True, help="the exported folder in bfloat16")
    parser.add_argument("--float32-export", type=Path, required=True, help="the same model in float32")
    parser.add_argument("--prompts", type=Path, required=True, help="a JSON list of texts")
    parser.add_argument("--reference", type=Path, required=True, help="what make_reference.py wrote for them")
    args = parser.parse_args()

    prompts: list[str] = json.loads(args.prompts.read_text())
    references: list[Reference] = json.loads(args.reference.read_text())
    if problems := check_inputs(prompts, references):
        print(*problems, sep="\n")
        return 1

    prompt_ids = [reference["prompt_ids"] for reference in references]
    max_model_len = max(len(ids) for ids in prompt_ids) + TOKENS
    in_float32 = generate_in_child(args.float32_export, "float32", prompt_ids, max_model_len)
    in_bfloat16 = generate_in_child(args.export, "bfloat16", prompts, max_model_len)

    total = TOKENS * len(prompts)
    compared, equal, problems = compare(in_float32, references)
    if not problems and compared < MIN_COMPARED * total:
        problems.append(
            f"float32: only {compared} of {total} tokens could be compared before a near-tie; at least"
            f" {MIN_COMPARED:.0%} must be, so take prompts or a model whose decisions are clearer"
        )
    problems += check_text(in_bfloat16, references)
    counts = {
        "prompts": len(prompts),
        "tokens_total": total,
        "tokens_compared": compared,
        "tokens_equal": equal,
        "bf16_generated_tokens": sum(len(ours.token_ids) for ours in in_bfloat16),
    }
    print(*problems, json.dumps(counts), sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
