"""From a checkpoint step to the Hugging Face folder that transformers and vLLM load."""

from __future__ import annotations

from pathlib import Path

from tptrain.ckpt.reading import StepReader
from tptrain.errors import refuse
from tptrain.family import facts_from_config, parameter_table
from tptrain.weights import export_folder

GB = 1_000_000_000


def export_step(
    step_folder: Path,
    out: Path,
    assets: Path | None = None,
    dtype: str = "bfloat16",
    max_shard_gb: float = 5.0,
    setting: str = "export.path",
) -> Path:
    """Write the weights of a checkpoint step as a Hugging Face folder; returns its path.

    assets: config, stop tokens and tokenizer of the run; None for `RUN/assets` beside the step.
    Raises ProblemsError when the assets are missing or `out` cannot be written; `out` is complete or absent.
    """
    folder = assets if assets is not None else step_folder.absolute().parent.parent / "assets"
    if not folder.is_dir():
        rule = "must be the folder of config and tokenizer that the run wrote"
        raise refuse("assets", folder, rule, "no such folder", "--assets RUN/assets")
    reader = StepReader(step_folder)
    config = reader.run["hf_config"]
    return export_folder(
        out,
        parameter_table(facts_from_config(config)),
        config,
        reader.read,
        assets=folder,
        dtype=dtype,
        max_shard_bytes=int(max_shard_gb * GB),
        setting=setting,
    )
