"""Every model family beside transformers and vLLM: logits, losses, export, served tokens.

    python tools/bench/families.py [--vllm PYTHON] [--work DIR] [--only FAMILY ...] [--only-served]

A small random model of each family, in float32 and on CPU. Served are models of slightly larger heads, which
vLLM's kernels ask for. The last line is a JSON object, family ->

logits_max_abs      max|d| / max|logit| between this decoder and transformers, over padded and packed rows
                    that are longer than the windows
loss_max_rel        largest relative difference between LOSS_STEPS training losses and those of transformers'
                    model with torch's AdamW
export_bit_equal    whether every tensor of the folder that transformers wrote comes back through a checkpoint
                    and an export as it was
vllm_tokens_equal   whether vLLM generates from the export, greedily, what transformers does; null without
                    --vllm

`make test-vllm` runs it with --only-served: logits and losses have tests of their own. Exit status 1 when a
bar is missed: 1e-5, 1e-4, equal, equal.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOGITS, LOSSES = 1e-5, 1e-4
PROMPTS, PROMPT_TOKENS = 8, (5, 24)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    sys.path.insert(0, str(ROOT))
    prepare_process()
    from tests import families

    names = args.only or list(families.CONFIGS)
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    found = {name: measured(name, args.work / name, args.only_served) for name in names}
    served = serve(args.vllm, args.work) if args.vllm else {}
    for name, row in found.items():
        row["vllm_tokens_equal"] = served[name]["tokens_equal"] if served else None
        if "not_served" in served.get(name, {}):
            row["vllm_says"] = served[name]["not_served"]
        print(f"{name}: {row}")
    print(json.dumps(found))
    return 0 if all(passes(row) for row in found.values()) else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm", metavar="PYTHON", help="python of the environment with vLLM")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "families", help="emptied first")
    parser.add_argument("--only-served", action="store_true", help="no logits and losses: export and vLLM")
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="some of the families")
    return parser.parse_args(argv)


def prepare_process() -> None:
    """JAX and torch on one CPU device, in quiet."""
    from tptrain.backends.make import quiet_libraries
    from tptrain.backends.xla.process import set_environment
    from tptrain.jaxside.process import setup_jax
    from tptrain.topology import parse_topology

    quiet_libraries()
    setup_jax(1)
    set_environment(parse_topology("cpu-1"), os.environ)
    from transformers.utils import logging

    logging.disable_progress_bar()


def measured(name: str, folder: Path, only_served: bool) -> dict[str, Any]:
    """All but vLLM's part, for which `folder` gets an export and a reference."""
    from tests import families, small

    model = small.reference_model(families.served_config(name))
    model.save_pretrained(folder / "hf")
    export(folder)
    write_reference(model, folder / "reference.json")
    exported = {"export_bit_equal": same_tensors(folder / "hf", folder / "export")}
    if only_served:
        return exported
    losses = zip(families.our_losses(name), families.transformers_losses(name), strict=True)
    return {
        "logits_max_abs": max(logits_gap(name, rows) for rows in (small.padded_rows(), small.packed_rows())),
        "loss_max_rel": max(abs(ours - theirs) / theirs for ours, theirs in losses),
        **exported,
    }


def logits_gap(name: str, rows: Any) -> float:
    import torch
    from torch.func import functional_call

    from tests import families, small
    from tptrain.family import facts_from_config
    from tptrain.models.decoder import Decoder

    model, real = families.model_of(name), families.real(rows)
    with torch.device("meta"):
        decoder = Decoder(facts_from_config(families.CONFIGS[name]))
    with torch.no_grad():
        tensors = {**small.weights_of(model), **decoder.constants()}
        ours = functional_call(decoder, tensors, rows.tensors())
    return small.difference(ours[real], families.reference_logits(model, rows)[real])


def export(folder: Path) -> None:
    """From `folder/hf` to a checkpoint and from that to `folder/export`."""
    from tools import convert_ckpt

    step = folder / "run" / "checkpoints" / "0"
    for words in (
        [folder / "hf", folder / "run"],
        [step, folder / "export", "--dtype", "float32", "--max-shard-gb", "1e-3"],
    ):
        if convert_ckpt.main([str(word) for word in words]):
            raise SystemExit(f"convert_ckpt {' '.join(map(str, words))} failed")


def same_tensors(one: Path, other: Path) -> bool:
    import torch
    from safetensors.torch import load_file

    mine, theirs = (
        {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
        for folder in (one, other)
    )
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def write_reference(model: Any, path: Path) -> None:
    """Prompts of random ids and transformers' greedy continuations."""
    import numpy as np

    from tests.vllm.make_reference import greedy

    random = np.random.default_rng(5)
    lengths = random.integers(*PROMPT_TOKENS, size=PROMPTS)
    prompts = [random.integers(3, model.config.vocab_size, size=int(length)).tolist() for length in lengths]
    path.write_text(json.dumps([greedy(model, prompt) for prompt in prompts]))


def serve(python: str, work: Path) -> dict[str, dict[str, Any]]:
    """What tests/vllm/check_families.py says of each family."""
    command = [python, str(ROOT / "tests" / "vllm" / "check_families.py"), str(work)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = result.stdout.splitlines()
    print(*lines[:-1], sep="\n")
    told: dict[str, dict[str, Any]] = json.loads(lines[-1])
    return told


def passes(row: dict[str, Any]) -> bool:
    return (
        row.get("logits_max_abs", 0.0) <= LOGITS
        and row.get("loss_max_rel", 0.0) <= LOSSES
        and row["export_bit_equal"]
        and row["vllm_tokens_equal"] is not False
    )


if __name__ == "__main__":
    sys.exit(main())
