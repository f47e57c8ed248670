"""From an Orbax checkpoint to a Hugging Face folder that transformers and vLLM load.

    python tools/convert_ckpt.py runs/tiny_gsm8k OUT                              a run: its newest step
    python tools/convert_ckpt.py runs/tiny_gsm8k/checkpoints/50 OUT --dtype float32

Training exports by itself at its end; this is for another step, another format or other file sizes. OUT must
not exist; it is written beside, checked, and renamed, so it is complete or absent.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tptrain.errors import Problem, TptrainError, raise_if_any, unknown_name

DTYPES = ("bfloat16", "float32", "float16")
_OK, _REFUSED = 0, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Convert one step. Returns the exit code: 0, or 2 for what the user can mend."""
    args = parse(argv)
    try:
        shard_gb = check(args)
        step, out = convert(args, shard_gb)
    except TptrainError as error:
        print(f"convert_ckpt: {error}", file=sys.stderr)
        return _REFUSED
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(f"{step} -> {out}: {size / 1e6:,.1f} MB of weights in {args.dtype}")
    return _OK


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; values are checked by `check`, which can say more than argparse."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a step, a run (its newest step) or its checkpoints")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument(
        "--assets", type=Path, help="folder of config and tokenizer; default: the run's own assets"
    )
    parser.add_argument("--dtype", default="bfloat16", help=f"one of {', '.join(DTYPES)}; default: bfloat16")
    parser.add_argument(
        "--max-shard-gb", default="5", help="largest safetensors file in GB (1e9 bytes); default: 5"
    )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> float:
    """Raise what is wrong with the options, all at once; returns --max-shard-gb as a number."""
    problems = []
    if args.dtype not in DTYPES:
        problems.append(unknown_name("--dtype", args.dtype, "weight format", DTYPES))
    try:
        shard_gb = float(args.max_shard_gb)
    except ValueError:
        shard_gb = math.nan
    if not 0 < shard_gb < math.inf:
        rule, other = "must be a number above 0", "it is the largest file in GB"
        problems.append(Problem("--max-shard-gb", args.max_shard_gb, rule, other, "5"))
    raise_if_any(problems)
    return shard_gb


def convert(args: argparse.Namespace, shard_gb: float) -> tuple[Path, Path]:
    """Write the folder; returns the step that was read and the folder.

    Imports JAX and Orbax, which take seconds, only once the options are known to be right.
    """
    from tptrain.backends.make import quiet_libraries
    from tptrain.jaxside.process import setup_jax

    quiet_libraries()
    setup_jax(1)
    from tptrain.ckpt.reading import find_step
    from tptrain.export import export_step

    step = find_step(args.checkpoint.expanduser(), "CHECKPOINT")
    assets = args.assets.expanduser() if args.assets else None
    return step, export_step(step, args.out.expanduser(), assets, args.dtype, shard_gb, setting="OUT")


if __name__ == "__main__":
    sys.exit(main())
