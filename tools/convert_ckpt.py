"""Between Orbax checkpoints and Hugging Face folders, both ways, whatever the size of the model.

    python tools/convert_ckpt.py runs/tiny_gsm8k OUT                 a run: its newest step -> a model folder
    python tools/convert_ckpt.py runs/tiny_gsm8k OUT --from-step best --dtype float32 --verify
    python tools/convert_ckpt.py runs/lora OUT --lora adapter        a run with adapters -> a PEFT folder
    python tools/convert_ckpt.py path/to/Meta-Llama-3-8B OUT         a model folder -> OUT/checkpoints/0
    python tools/convert_ckpt.py inspect PATH [--from-step STEP] [--verify] [--json]
    python tools/convert_ckpt.py diff A B                            steps, runs or model folders

A model folder is what transformers and vLLM load. OUT/checkpoints/0 is what `model.pretrained` of a recipe,
`tptrain generate` and JAX read. Weights stream, so memory does not grow with the model; moments of the
optimizer are not read. OUT is written beside its place, checked and renamed: it is complete or absent, and
after a kill the same command starts anew. Training exports by itself at its end.

Exit codes: 0; 1 when --verify or inspect finds damage or diff finds differences; 2 for what you can mend.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tptrain.config.settings import settings
from tptrain.convert import VERIFY_LEVELS, VerificationError
from tptrain.errors import Problem, TptrainError, raise_if_any, unknown_name
from tptrain.family.table import DTYPE_BYTES

_OK, _DIFFERENT, _REFUSED = 0, 1, 2
_FROM_STEP = "of a run: latest (the default), best (by the run's save.best_metric) or the number of a step"
_UNVERIFIED = "take also a step without a digest manifest"


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {"inspect": inspect_command, "diff": diff_command}
    command = commands.get(words[0]) if words else None
    try:
        return command(words[1:]) if command else convert_command(words)
    except TptrainError as error:
        print(f"convert_ckpt: {error}", file=sys.stderr)
        return _DIFFERENT if isinstance(error, VerificationError) else _REFUSED


def convert_command(words: Sequence[str]) -> int:
    """Convert SOURCE into OUT. Imports JAX and Orbax, which take seconds, once the options are right."""
    args = parse(words)
    shard_gb = check(args)
    prepare_process()
    from tptrain.convert.conversion import Options, convert

    assets = args.assets.expanduser() if args.assets else None
    given = {**vars(args), "out": args.out.expanduser(), "assets": assets, "max_shard_gb": shard_gb}
    for line in convert(Options(**given)):
        print(line)
    return _OK


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line of a conversion; values are checked by `check`, which can say more than argparse."""
    parser = _parser("convert_ckpt.py", __doc__)
    parser.add_argument("source", metavar="SOURCE", help="a step, a run, a model folder or a hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--from-step", metavar="STEP", help=_FROM_STEP)
    parser.add_argument(
        "--dtype",
        help=f"of the weights in OUT: {', '.join(DTYPE_BYTES)}; default: bfloat16 for a model folder, for a "
        "checkpoint float32, which training reads",
    )
    parser.add_argument(
        "--max-shard-gb", metavar="GB", help="largest safetensors file in GB (1e9 bytes); default: 5"
    )
    parser.add_argument(
        "--assets", type=Path, help="folder of config and tokenizer; default: the run's own assets"
    )
    parser.add_argument(
        "--lora",
        metavar="merged|adapter",
        help="of a step of adapters: the whole model with them merged (the default), or a PEFT folder",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the model below the adapters that are merged, where it is no longer where it was in training",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, once the new one is complete")
    parser.add_argument("--unverified", action="store_true", help=_UNVERIFIED)
    parser.add_argument(
        "--verify",
        metavar="all|digests",
        help="read OUT back: every tensor against SOURCE (digests), and logits against transformers' (all)",
    )
    # A bare --verify must not take the next word for its value.
    return parser.parse_args(["--verify=all" if word == "--verify" else word for word in words])


def check(args: argparse.Namespace) -> float | None:
    """Raise what is wrong with the options, all at once; returns --max-shard-gb as a number."""
    problems = []
    if args.dtype is not None and args.dtype not in DTYPE_BYTES:
        problems.append(unknown_name("--dtype", args.dtype, "weight format", DTYPE_BYTES))
    forms = settings()["export.lora"].choices
    if args.lora is not None and args.lora not in forms:
        problems.append(unknown_name("--lora", args.lora, "form", forms))
    if args.verify is not None and args.verify not in VERIFY_LEVELS:
        problems.append(unknown_name("--verify", args.verify, "level", VERIFY_LEVELS))
    shard_gb = None
    if args.max_shard_gb is not None:
        try:
            shard_gb = float(args.max_shard_gb)
        except ValueError:
            shard_gb = math.nan
        if not 0 < shard_gb < math.inf:
            rule, other = "must be a number above 0", "it is the largest file in GB"
            problems.append(Problem("--max-shard-gb", args.max_shard_gb, rule, other, "5"))
    raise_if_any(problems)
    return shard_gb


def inspect_command(words: Sequence[str]) -> int:
    """Print what a step or a model folder holds. Returns 1 when a step is damaged."""
    about = "Tensors, sizes, run facts and the state of the digest manifest."
    parser = _parser("convert_ckpt.py inspect", about)
    parser.add_argument("path", metavar="PATH", help="a step, a run or a model folder")
    parser.add_argument("--from-step", metavar="STEP", help=_FROM_STEP)
    parser.add_argument("--verify", action="store_true", help="compare the digest of every file of a step")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    args = parser.parse_args(words)
    prepare_process()
    from tptrain.convert.inspecting import as_json, as_page, inspect_found
    from tptrain.convert.sources import find_model

    contents = inspect_found(find_model(args.path, "PATH", args.from_step), args.verify)
    print(json.dumps(as_json(contents), indent=1) if args.json else as_page(contents))
    return _DIFFERENT if contents.manifest is not None and contents.manifest.problems else _OK


def diff_command(words: Sequence[str]) -> int:
    """Print what differs between two models. Returns 1 when anything does."""
    about = "Names, shapes, dtypes, values, fields of the config and facts of the run that differ."
    parser = _parser("convert_ckpt.py diff", about)
    parser.add_argument("a", metavar="A", help="a step, a run (its newest step), a model folder or a hub id")
    parser.add_argument("b", metavar="B", help="the same")
    parser.add_argument("--unverified", action="store_true", help=_UNVERIFIED)
    args = parser.parse_args(words)
    prepare_process()
    from tptrain.convert.differences import as_page, compare, compared_bytes
    from tptrain.convert.progress import ByteProgress
    from tptrain.convert.sides import open_side
    from tptrain.convert.sources import find_model

    found = [(find_model(given, setting), setting) for given, setting in ((args.a, "A"), (args.b, "B"))]
    a, b = (open_side(model, setting, args.unverified) for model, setting in found)
    with ByteProgress("comparing", compared_bytes(a, b)) as progress:
        differences = compare(a, b, progress)
    print("\n".join(f"{setting}: {model.folder}" for model, setting in found))
    print(as_page(differences))
    return _DIFFERENT if differences else _OK


def _parser(program: str, description: str | None) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(program, description=description, formatter_class=form, allow_abbrev=False)


def prepare_process() -> None:
    """Keep JAX on the CPU, whatever devices there are, and libraries quiet."""
    from tptrain.backends.make import quiet_libraries
    from tptrain.jaxside.process import setup_jax

    quiet_libraries()
    setup_jax(1)


if __name__ == "__main__":
    sys.exit(main())
