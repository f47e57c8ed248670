"""From a checkpoint step to the folder that transformers and vLLM load: a model, or a PEFT adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tptrain.ckpt.base_model import open_base, saved_base
from tptrain.ckpt.merging import MergedReader
from tptrain.ckpt.reading import StepReader, check_tree, lora_of, readable
from tptrain.ckpt.steps import is_step_folder
from tptrain.config.schema import LoraSection
from tptrain.config.state_parts import PARAMS
from tptrain.config.trainable import table_of
from tptrain.errors import raise_if_any, refuse
from tptrain.family import ParamRow, facts_from_config, stored_rows
from tptrain.family.lora import peft_config
from tptrain.hf_files import tokenizer_files
from tptrain.weights import export_adapter_folder, export_folder

GB = 1_000_000_000
ADAPTER = "adapter"


@dataclass(frozen=True)
class StepModel:
    """The model in a step, or its adapters: what an export reads.

    folder:  the step. config: of the model, as in a config.json.
    table:   the rows that are exported; those of adapters where `peft_config` is given.
    assets:  folder of config, stop tokens and tokenizer; None for a model without a tokenizer.
    """

    folder: Path
    reader: StepReader | MergedReader
    config: dict[str, Any]
    table: tuple[ParamRow, ...]
    assets: Path | None
    peft_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class LoraForm:
    """What is made of a step of adapters.

    form:         as `export.lora` has it; None for its default.
    base:         where the model below the adapters is; None for where it was when they were trained.
    setting, base_setting: where the user chose the two, for messages.
    """

    form: str | None = None
    base: str | None = None
    setting: str = "export.lora"
    base_setting: str = "model.pretrained"


def open_step(
    step_folder: Path,
    assets: Path | None = None,
    setting: str = "checkpoint",
    unverified: bool = False,
    lora_form: LoraForm = LoraForm(),
) -> StepModel:
    """Open a step for reading its weights; arguments as in `export_step`.

    Raises ProblemsError when the step is damaged, does not hold the model of its config, or lacks its assets;
    of a step of adapters that are to be merged also when the model below them is not there or another one.
    """
    reader = StepReader(step_folder, setting, unverified)
    config = reader.run.get("hf_config")
    if not isinstance(config, dict):
        rule, other = "must say which model it holds", "its run item has no hf_config"
        raise refuse(setting, step_folder, rule, other, "a step that tptrain saved or converted")
    lora = lora_of(reader.run)
    if lora is None:
        _refuse_form(lora_form, step_folder)
    table = table_of(facts_from_config(config), lora or LoraSection())
    held = [row for row in stored_rows(table) if lora is None or row.is_adapter]
    with readable(step_folder, setting):
        raise_if_any(
            check_tree(step_folder / PARAMS, {row.name: row for row in held}, setting, any_float=True)
        )
    model = StepModel(step_folder, reader, config, table, _assets(step_folder, assets, reader))
    return model if lora is None else _of_adapters(model, reader, lora, lora_form)


def _refuse_form(lora_form: LoraForm, step_folder: Path) -> None:
    """Choices that mean nothing for a step that holds the whole model."""
    given = {lora_form.setting: lora_form.form, lora_form.base_setting: lora_form.base}
    for setting, value in given.items():
        if value is not None:
            rule, other = "is for a step of adapters", f"{step_folder} holds the whole model"
            raise refuse(setting, value, rule, other, f"no {setting}")


def _of_adapters(model: StepModel, reader: StepReader, lora: LoraSection, lora_form: LoraForm) -> StepModel:
    """A step of adapters in one of its forms. reader: of the step."""
    if lora_form.form == ADAPTER:
        pretrained = reader.run["base"]["pretrained"]
        has_folder = pretrained is not None and not is_step_folder(Path(pretrained))
        config = peft_config(model.table, lora.rank, lora.alpha, pretrained if has_folder else None)
        adapters = tuple(row for row in model.table if row.is_adapter)
        return replace(model, table=adapters, peft_config=config)
    base = saved_base(reader.run, lora_form.base, lora_form.base_setting)
    table = tuple(row for row in model.table if not row.is_adapter)
    weights = open_base(base, table, lora_form.base_setting)
    return replace(model, table=table, reader=MergedReader(weights, reader, model.table, lora.scale))


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
    lora_form: LoraForm = LoraForm(),
) -> Path:
    """Write the weights of a checkpoint step as a Hugging Face folder; returns its path.

    assets:     config, stop tokens and tokenizer of the run; None for `RUN/assets` beside the step.
    unverified: whether a step without a digest manifest will do.
    lora_form:  of a step of adapters: the whole model, or a PEFT folder of the adapters.
    Raises ProblemsError when the step is damaged, the assets are missing or `out` cannot be written; `out` is
    complete or absent. Memory does not grow with the model: see `export_folder`.
    """
    model = open_step(step_folder, assets, unverified=unverified, lora_form=lora_form)
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
    write: Callable[..., Path] = export_folder
    config, options = model.config, {"max_shard_bytes": int(max_shard_gb * GB)}
    if model.peft_config is not None:
        write, config, options = export_adapter_folder, model.peft_config, {}
    return write(
        out,
        model.table,
        config,
        model.reader.read_blocks,
        assets=model.assets,
        dtype=dtype,
        setting=setting,
        overwrite=overwrite,
        progress=progress,
        dtype_setting=dtype_setting,
        **options,
    )
