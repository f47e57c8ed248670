"""What a run reads before it touches a device, records and tokenizer and weights, and the assets it keeps."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerFast

from tptrain.backends.base import TensorSource
from tptrain.ckpt.base_model import BaseModel, base_model
from tptrain.ckpt.reading import StepReader, check_tree
from tptrain.ckpt.steps import is_step_folder
from tptrain.config.chat_templates import asked_tokens, chosen_template
from tptrain.config.plan import Plan
from tptrain.config.schema import ModelSection
from tptrain.config.state_parts import PARAMS
from tptrain.data.batches import Batches
from tptrain.data.dataset import TokenizedDataset
from tptrain.data.render import texts_of
from tptrain.data.sources import Records, open_records
from tptrain.data.split import split_records
from tptrain.data.token_cache import tokenized
from tptrain.data.tokenizer import check_tokenizer, load_tokenizer, make_tokenizer
from tptrain.errors import ProblemsError, raise_if_any
from tptrain.family import ParamRow, stored_rows
from tptrain.family.lora import model_rows
from tptrain.jaxside.random_init import RandomSource
from tptrain.train.folder import RunFolder, resumes
from tptrain.train.grown_vocab import GrownVocab
from tptrain.weights import (
    CONFIG_FILES,
    TOKENIZER_FILES,
    SafetensorsSource,
    collect_assets,
    local_folder,
)


@dataclass(frozen=True)
class Prepared:
    """Everything that reading the inputs yields, before a device is touched.

    stop_ids:         what ends an answer, in the records that are trained on.
    data_digest:      `Batches.digest`: what a run that goes on compares.
    base:             the model below the adapters, which it compares as well; None without adapters.
    held_out:         rows for the held-out loss, None where it is not measured.
    held_out_records: the records that data.validation sets apart, None without it.
    """

    tokenizer: PreTrainedTokenizerFast
    batches: Batches
    stop_ids: tuple[int, ...]
    data_digest: str
    base: BaseModel | None = None
    held_out: TokenizedDataset | None = None
    held_out_records: Records | None = None


def prepare(plan: Plan, folder: RunFolder, console: Console) -> Prepared:
    """Read records and tokenizer; tokenise."""
    recipe = plan.recipe
    data = recipe.data
    records, validation = open_records(data.path, data.subset, data.split, data.max_records), None
    if data.validation:
        records, validation = split_records(records, data)
    tokenizer = _tokenizer(plan, folder, records)
    raise_if_any(check_tokenizer(tokenizer, plan.facts.vocab_size))
    dataset, counts = tokenized(records, tokenizer, data, console.print)
    console.print(f"Data: {counts}.")
    batches = Batches.of_run(dataset, data, recipe.optim.accumulation, recipe.schedule)
    held_out = _held_out(plan, tokenizer, validation, console)
    digest, base = batches.digest(), base_model(plan)
    return Prepared(tokenizer, batches, dataset.stop_ids, digest, base, held_out, validation)


def _held_out(
    plan: Plan, tokenizer: PreTrainedTokenizerFast, validation: Records | None, console: Console
) -> TokenizedDataset | None:
    """The rows of the held-out loss, rendered like those of training; None where it is not measured."""
    section, data = plan.recipe.eval, plan.recipe.data
    if validation is not None:
        setting, records = "data.validation", validation
    elif section.loss_path is not None:
        setting = "eval.loss_path"
        records = open_records(
            section.loss_path, section.subset, section.split, section.loss_records, setting
        )
    else:
        return None
    try:
        # Few records may by chance be unlabelled ones for the most part; training tells of a wrong preset.
        lenient = replace(data, max_unlabelled=1.0)
        dataset, counts = tokenized(records, tokenizer, lenient, console.print)
    except ProblemsError as error:
        # Columns and lengths are the same settings for all records; where they come from is not.
        value = data.validation if validation is not None else section.loss_path
        problems = [
            replace(problem, setting=setting, value=value) if problem.setting == "data.path" else problem
            for problem in error.problems
        ]
        raise ProblemsError(problems) from error
    console.print(f"Held out: {counts}.")
    return dataset


def _tokenizer(plan: Plan, folder: RunFolder, records: Records) -> PreTrainedTokenizerFast:
    """The recipe's tokenizer; a run that goes on reads back the one that it has kept."""
    model = plan.recipe.model
    if resumes(plan, folder):
        if model.tokenizer == "train":
            return PreTrainedTokenizerFast.from_pretrained(str(folder.assets))
        # It has what the recipe adds: a template's file may have changed since.
        return load_tokenizer(ModelSection(tokenizer=str(folder.assets)))
    if model.tokenizer != "train":
        return load_tokenizer(model)
    return make_tokenizer(model, texts_of(records, plan.recipe.data), plan.facts.vocab_size)


def weight_source(plan: Plan) -> TensorSource | Path:
    """Where the weights of the model come from: a step folder, safetensors files, or a random generator.

    Adapters are not among them: those of a new run are random, those of one that goes on in its checkpoint.
    """
    pretrained = plan.recipe.model.pretrained
    if pretrained is None:
        return RandomSource(plan.recipe.seed, plan.facts.initializer_range)
    path = Path(pretrained).expanduser()
    if not plan.new_rows:
        return path if is_step_folder(path) else SafetensorsSource(pretrained, model_rows(plan.table))
    return GrownVocab(partial(_held_source, plan, pretrained), plan.table, plan.new_rows)


def _held_source(plan: Plan, pretrained: str, table: Sequence[ParamRow]) -> TensorSource:
    """A checkpoint with fewer rows than the model. table: what it holds."""
    path = Path(pretrained).expanduser()
    if not is_step_folder(path):
        return SafetensorsSource(pretrained, table)
    setting = "model.pretrained"
    raise_if_any(
        check_tree(path / PARAMS, {row.name: row for row in stored_rows(table)}, setting, any_float=True)
    )
    return StepReader(path, setting, plan.recipe.unverified)


def write_assets(
    plan: Plan, folder: RunFolder, tokenizer: PreTrainedTokenizerFast, stop_ids: Sequence[int]
) -> None:
    """Write a new run's config and tokenizer; what a run that saved no step has left is replaced.

    stop_ids: what ends an answer, as the records have it: a server is told to stop there.
    """
    if folder.assets.exists():
        shutil.rmtree(folder.assets)
    model = plan.recipe.model
    tokenizer_folder = checkpoint_folder = None
    if model.pretrained is not None:
        checkpoint_folder = _assets_of(model.pretrained, "model.pretrained", CONFIG_FILES)
    if model.tokenizer == "pretrained":
        assert model.pretrained is not None
        tokenizer_folder = _assets_of(model.pretrained, "model.pretrained", TOKENIZER_FILES)
    elif model.tokenizer != "train":
        tokenizer_folder = local_folder(model.tokenizer, "model.tokenizer", TOKENIZER_FILES)
    source = (tokenizer_folder, checkpoint_folder)
    template, ids = chosen_template(model), tokenizer.get_vocab()
    collect_assets(
        folder.assets,
        plan.hf_config,
        tokenizer,
        *source,
        stops=stop_ids,
        added={token: ids[token] for token in asked_tokens(model)},
        chat_template=template.text if template else None,
    )


def _assets_of(source: str, setting: str, patterns: tuple[str, ...]) -> Path:
    """The folder with the config and tokenizer of a checkpoint; a step of a run keeps them in its assets."""
    path = Path(source).expanduser()
    return path.parent.parent / "assets" if is_step_folder(path) else local_folder(source, setting, patterns)
