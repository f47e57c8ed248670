"""One conversion from the command line: which way, what is checked before, and what is verified after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tptrain.convert.from_hf import FolderModel, convert_folder, open_folder, storage_dtype
from tptrain.convert.progress import ByteProgress
from tptrain.convert.sources import find_model, place_problems
from tptrain.convert.verification import memory_problems, verify_digests, verify_logits
from tptrain.errors import Problem, raise_if_any
from tptrain.export import LoraForm, StepModel, export_model, open_step
from tptrain.weights import export_bytes

EXPORT_DTYPE = "bfloat16"
MAX_SHARD_GB = 5.0


@dataclass(frozen=True)
class Options:
    """What the command line says; None where it says nothing.

    source:    see `find_model`; from_step: which step of a run.
    dtype:     of the weights that are written. max_shard_gb: of the largest safetensors file, in 1e9 bytes.
    lora, base: of a step of adapters, see `LoraForm`.
    verify:    one of VERIFY_LEVELS, or None. overwrite, unverified: whether they were given.
    """

    source: str
    out: Path
    from_step: str | None = None
    dtype: str | None = None
    max_shard_gb: float | None = None
    assets: Path | None = None
    lora: str | None = None
    base: str | None = None
    verify: str | None = None
    overwrite: bool = False
    unverified: bool = False


def convert(options: Options) -> list[str]:
    """Convert SOURCE into the folder OUT; returns what was done, as lines.

    Raises ProblemsError before anything is written, or with nothing left of it; and VerificationError when
    what was written, which stays, is not what it was made from.
    """
    found = find_model(options.source, "SOURCE", options.from_step)
    if found.is_step:
        return _to_folder(options, found.folder)
    raise_if_any(_step_options(options))
    return _to_checkpoint(options, open_folder(found.folder, options.source))


def _step_options(options: Options) -> list[Problem]:
    """Options that were given and mean nothing for a Hugging Face folder."""
    given = {
        "--assets": options.assets,
        "--max-shard-gb": options.max_shard_gb,
        "--lora": options.lora,
        "--base": options.base,
        "--unverified": options.unverified or None,
    }
    rule, other = "belongs to the other direction", f"SOURCE={options.source} is a model folder"
    return [
        Problem(name, value, rule, other, "no such option")
        for name, value in given.items()
        if value is not None
    ]


def _to_folder(options: Options, step_folder: Path) -> list[str]:
    form = LoraForm(options.lora, options.base, "--lora", "--base")
    step = open_step(step_folder, options.assets, "SOURCE", options.unverified, form)
    raise_if_any(_adapter_options(options) if step.peft_config is not None else [])
    sources = [step_folder, *([step.assets] if step.assets is not None else [])]
    raise_if_any(place_problems(options.out, sources, options.overwrite))
    raise_if_any(memory_problems(step.table) if options.verify == "all" else [])
    dtype = options.dtype or EXPORT_DTYPE
    shard_gb = MAX_SHARD_GB if options.max_shard_gb is None else options.max_shard_gb
    with ByteProgress("writing", export_bytes(step.table, dtype)) as progress:
        out = export_model(
            step, options.out, dtype, shard_gb, "OUT", options.overwrite, progress, dtype_setting="--dtype"
        )
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    lines = [_done(step_folder, out, size, dtype), *_no_tokenizer(step.assets is not None)]
    if options.verify is None:
        return lines
    return [*lines, *_verified(options.verify, step, open_folder(out, str(out), "OUT"), dtype)]


def _adapter_options(options: Options) -> list[Problem]:
    """Options that mean nothing for a folder of adapters."""
    rule, other = "needs a whole model", "--lora=adapter"
    given = {"--verify": options.verify, "--base": options.base, "--max-shard-gb": options.max_shard_gb}
    fix = "--lora=merged, or no such option"
    return [Problem(name, value, rule, other, fix) for name, value in given.items() if value is not None]


def _to_checkpoint(options: Options, model: FolderModel) -> list[str]:
    raise_if_any(place_problems(options.out, [model.folder], options.overwrite))
    raise_if_any(memory_problems(model.table) if options.verify == "all" else [])
    dtype = storage_dtype(model, options.dtype)
    size = model.num_bytes(dtype)
    with ByteProgress("writing", size) as progress:
        step_folder = convert_folder(model, options.out, dtype, options.overwrite, progress)
    lines = [_done(model.folder, step_folder, size, dtype), *_no_tokenizer(model.has_tokenizer)]
    if options.verify is None:
        return lines
    return [*lines, *_verified(options.verify, open_step(step_folder, setting="OUT"), model, dtype)]


def _done(source: Path, out: Path, num_bytes: int, dtype: str) -> str:
    return f"{source} -> {out}: {num_bytes / 1e6:,.1f} MB of weights in {dtype}"


def _no_tokenizer(has_tokenizer: bool) -> list[str]:
    return [] if has_tokenizer else ["No tokenizer: there was none to copy, so the model has none."]


def _verified(level: str, step: StepModel, folder: FolderModel, dtype: str) -> list[str]:
    tensors = verify_digests(step, folder, dtype)
    lines = [f"verified: {tensors} tensors read back, each with the digest of its source in {dtype}"]
    if level == "all":
        gaps = verify_logits(step, folder.folder, dtype)
        lines += [f"verified: logits equal transformers', {gap}" for gap in gaps]
    return lines
