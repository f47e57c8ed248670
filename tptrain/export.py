"""From a checkpoint step to the Hugging Face folder that transformers and vLLM load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tptrain.ckpt.reading import StepReader, check_tree, readable
from tptrain.config.state_parts import PARAMS
from tptrain.errors import raise_if_any, refuse
from tptrain.family import ParamRow, facts_from_config, parameter_table, stored_rows
from tptrain.hf_files import tokenizer_files
from tptrain.weights import export_folder

GB = 1_000_000_000


@dataclass(frozen=True)
class StepModel:
    """The model in a step: what an export reads.

    folder:  the step. config: of the model, as in a config.json.
    assets:  folder of config, stop tokens and tokenizer; None for a model without a tokenizer.
    """

    folder: Path
    reader: StepReader
    config: dict[str, Any]
    table: tuple[ParamRow, ...]
    assets: Path | None


def open_step(
    step_folder: Path, assets: Path | None = None, setting: str = "checkpoint", unverified: bool = False
) -> StepModel:
    """Open a step for reading its weights; arguments as in `export_step`.

    Raises ProblemsError when the step is damaged, does not hold the model of its config, or lacks its assets.
    """
    reader = StepReader(step_folder, setting, unverified)
    config = reader.run.get("hf_config")
    if not isinstance(config, dict):
        rule, other = "must say which model it holds", "its run item has no hf_config"
        raise refuse(setting, step_folder, rule, other, "a step that tptrain saved or converted")
    table = parameter_table(facts_from_config(config))
    rows = {row.name: row for row in stored_rows(table)}
    with readable(step_folder, setting):
        raise_if_any(check_tree(step_folder / PARAMS, rows, setting, any_float=True))
    return StepModel(step_folder, reader, config, table, _assets(step_folder, assets, reader))


def _assets(step_folder: Path, given: Path | None, reader: StepReader) -> Path | None:
    """The folder of assets; None for a step converted from a folder that had no tokenizer."""
    folder = given if given is not None else step_folder.absolute().parent.parent / "assets"
    if not folder.is_dir():
        rule = "must be the folder of config and tokenizer that the run wrote"
        raise refuse("assets", folder, rule, "no such folder", "--assets RUN/assets")
    is_converted = "source" in reader.run and given is None
    return None if is_converted and not tokenizer_files(folder) else folder


def export_step(
    step_folder: Path,
    out: Path,
    assets: Path | None = None,
    dtype: str = "bfloat16",
    max_shard_gb: float = 5.0,
    setting: str = "export.path",
    unverified: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the weights of a checkpoint step as a Hugging Face folder; returns its path.

    assets:     config, stop tokens and tokenizer of the run; None for `RUN/assets` beside the step.
    unverified: whether a step without a digest manifest will do.
    Raises ProblemsError when the step is damaged, the assets are missing or `out` cannot be written; `out` is
    complete or absent. Memory does not grow with the model: see `export_folder`.
    """
    model = open_step(step_folder, assets, unverified=unverified)
    return export_model(model, out, dtype, max_shard_gb, setting, overwrite)


def export_model(
    model: StepModel,
    out: Path,
    dtype: str = "bfloat16",
    max_shard_gb: float = 5.0,
    setting: str = "export.path",
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    dtype_setting: str = "export.dtype",
) -> Path:
    """The same for a step that is open. progress: told the bytes written since its last call."""
    return export_folder(
        out,
        model.table,
        model.config,
        model.reader.read_blocks,
        assets=model.assets,
        dtype=dtype,
        max_shard_bytes=int(max_shard_gb * GB),
        setting=setting,
        overwrite=overwrite,
        progress=progress,
        dtype_setting=dtype_setting,
    )
