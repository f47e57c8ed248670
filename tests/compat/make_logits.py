"""Write what the main environment's transformers makes of an exported folder, for check_transformers4.py.

    python tests/compat/make_logits.py --export DIR --logits logits.safetensors --sample sample.json

logits.safetensors gets `input_ids` [B, T] int64, random over the whole vocabulary, and `logits` [B, T, V]
float32, which the folder's model gives for them in float32. sample.json gets a `text` that tokenizers stumble
over and the `ids` that the folder's tokenizer makes of it. B batch, T tokens, V vocabulary.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 2
TOKENS = 192  # long, since a wrong rope shows least in the first positions
TEXT = "  It cost $12.50 , didn't it ?\n\tYes:  3 x 4 = 12, naïve 日本 🙂\n\n20230\n"


def main() -> None:
    """Read the command line, run the model and the tokenizer, write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--export", type=Path, required=True, help="the exported folder")
    parser.add_argument("--logits", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--sample", type=Path, required=True, help="the JSON file to write")
    args = parser.parse_args()

    # Eager on both sides: what transformers 4 takes by default leaves out the soft-cap of Gemma 2.
    model = AutoModelForCausalLM.from_pretrained(
        args.export, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = min(TOKENS, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (BATCH, tokens), generator=generator)
    with torch.inference_mode():
        logits = model(input_ids=input_ids).logits
    save_file({"input_ids": input_ids, "logits": logits.contiguous()}, args.logits)

    tokenizer = AutoTokenizer.from_pretrained(args.export)
    ids = tokenizer(TEXT).input_ids
    args.sample.write_text(json.dumps({"text": TEXT, "ids": ids}))
    print(f"{args.logits}: {list(logits.shape)}, logit std {logits.std():.3g}; {args.sample}: {len(ids)} ids")


if __name__ == "__main__":
    main()
