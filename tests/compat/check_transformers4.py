"""Read an exported folder with transformers 4 and hold it against what the main environment reads from it.

Run it with the python of the environment that tools/ci/make_transformers4_env.sh builds:

    python tests/compat/check_transformers4.py --export DIR --logits logits.safetensors --sample sample.json

make_logits.py writes the two inputs from the same folder. Checked are

* the config: transformers 4 reads `rope_theta`, `rope_scaling`, `rope_local_base_freq` and, before 4.56,
  `torch_dtype`. All must say what `rope_parameters` and `dtype` say, the only spellings that transformers 5
  writes;
* the weights: every one is loaded, and float32 logits differ by at most TOLERANCE of the largest logit;
* the tokenizer: it encodes the sample text to the sample ids and decodes them to the same text.

Every problem is printed on a line of its own. The last line is JSON with what was read, whether or not there
were any. Exit status: 0 no problem, 1 some.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-5  # of the largest logit; both sides compute in float32


def expected_rope(rope_parameters: dict[str, Any]) -> dict[str, Any]:
    """The transformers 4 attributes that say the same as `rope_parameters`.

    A model whose layers alternate has one entry for each kind of layer: its full layers are `rope_theta` and
    `rope_scaling`, its sliding layers `rope_local_base_freq`.
    """
    full = rope_parameters.get("full_attention", rope_parameters)
    scaling = {key: value for key, value in full.items() if key != "rope_theta"}
    expected = {
        "rope_theta": full["rope_theta"],
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
    }
    if "sliding_attention" in rope_parameters:
        expected["rope_local_base_freq"] = rope_parameters["sliding_attention"]["rope_theta"]
    return expected


def check_config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What transformers 4 reads about rope and dtype, and where that is not what transformers 5 reads."""
    written = json.loads((folder / "config.json").read_text())
    if missing := [key for key in ("rope_parameters", "dtype") if key not in written]:
        return {}, [f"config.json has no {' and no '.join(missing)}, which transformers 5 reads"]
    config = AutoConfig.from_pretrained(folder)
    expected = expected_rope(written["rope_parameters"])
    # Families without long-context variants have no `rope_scaling` in transformers 4, which is plain rope.
    read = {key: getattr(config, key, None) for key in expected}
    expected["dtype"], read["dtype"] = written["dtype"], str(config.dtype).removeprefix("torch.")
    expected["torch_dtype"], read["torch_dtype"] = written["dtype"], written.get("torch_dtype")
    problems = [
        f"config.json: {key} is read as {read[key]!r}, but rope_parameters and dtype say {value!r}"
        for key, value in expected.items()
        if read[key] != value
    ]
    return read, problems


def check_logits(folder: Path, logits_file: Path) -> tuple[dict[str, Any], list[str]]:
    """The largest difference in logits, and whether it or a weight that was not loaded is a problem."""
    saved = load_file(logits_file)
    # Eager: what transformers 4 takes by default leaves out the soft-cap of Gemma 2.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, loading = loaded
    with torch.inference_mode():
        logits = model.eval()(input_ids=saved["input_ids"]).logits
    problems = [f"weights: {kind}: {sorted(names)}" for kind, names in loading.items() if names]
    if logits.shape != saved["logits"].shape:
        return {}, [*problems, f"logits are {list(logits.shape)}, not {list(saved['logits'].shape)}"]
    difference = (logits - saved["logits"]).abs().max().item()
    largest = saved["logits"].abs().max().item()
    if not difference <= TOLERANCE * largest:
        problems.append(
            f"logits differ by {difference:.3g}, more than {TOLERANCE} of the largest, {largest:.3g}"
        )
    return {"max_logit_difference": difference, "max_logit": largest}, problems


def check_tokenizer(folder: Path, sample_file: Path) -> tuple[dict[str, Any], list[str]]:
    """The tokenizer's class, and where it encodes or decodes the sample otherwise."""
    sample = json.loads(sample_file.read_text())
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever stops it is the finding, and the weights are still worth checking
        return {}, [f"tokenizer: cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}"]
    problems = []
    if (ids := tokenizer(sample["text"]).input_ids) != sample["ids"]:
        problems.append(f"tokenizer: the sample becomes {ids}, not {sample['ids']}")
    if (text := tokenizer.decode(sample["ids"], skip_special_tokens=True)) != sample["text"]:
        problems.append(f"tokenizer: the sample ids become {text!r}, not {sample['text']!r}")
    return {"tokenizer_class": type(tokenizer).__name__, "sample_ids": len(ids)}, problems


def main() -> int:
    """Read the command line, run the three checks, print the problems and what was read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--export", type=Path, required=True, help="the exported folder")
    parser.add_argument("--logits", type=Path, required=True, help="the safetensors file of make_logits.py")
    parser.add_argument("--sample", type=Path, required=True, help="the JSON file of make_logits.py")
    args = parser.parse_args()

    results = [
        check_config(args.export),
        check_logits(args.export, args.logits),
        check_tokenizer(args.export, args.sample),
    ]
    summary: dict[str, Any] = {"transformers": transformers.__version__}
    for read, problems in results:
        summary |= read
        print(*problems, sep="\n", end="\n" if problems else "")
    print(json.dumps(summary))
    return 1 if any(problems for _, problems in results) else 0


if __name__ == "__main__":
    sys.exit(main())
