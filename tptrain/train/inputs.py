"""What a run reads before it touches a device, records and tokenizer and weights, and the assets it keeps."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
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
from tptrain.config.mixing import problems_of_source
from tptrain.config.plan import Plan
from tptrain.config.schema import ModelSection
from tptrain.config.state_parts import PARAMS
from tptrain.data.batches import Batches
from tptrain.data.dataset import TokenizedDataset
from tptrain.data.recipe_sources import Source, open_sources, texts_of_sources
from tptrain.data.sources import Records, open_records
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
    held_out:         rows for the held-out loss by source, None where it is not measured.
    held_out_records: the records that data.validation sets apart, None without it.
    """

    tokenizer: PreTrainedTokenizerFast
    batches: Batches
    stop_ids: tuple[int, ...]
    data_digest: str
    base: BaseModel | None = None
    held_out: Mapping[str, TokenizedDataset] | None = None
    held_out_records: Records | None = None


def prepare(plan: Plan, folder: RunFolder, console: Console) -> Prepared:
    """Read records and tokenizer; tokenise."""
    recipe = plan.recipe
    sources = open_sources(recipe.data)
    tokenizer = _tokenizer(plan, folder, sources)
    raise_if_any(check_tokenizer(tokenizer, plan.facts.vocab_size))
    rows = {}
    for source in sources:
        rows[source.name], counts = source.tokenized(tokenizer, console.print)
        console.print(f"{source.title}: {counts}.")
    batches = Batches.of_run(rows, recipe.data, recipe.optim.accumulation, recipe.schedule)
    if len(rows) > 1:
        shares = batches.mixture.row_shares().items()
        console.print(f"Mix: {', '.join(f'{name} {share:.2%}' for name, share in shares)} of the rows.")
    # Each begins with EOS.
    stop_ids = tuple(dict.fromkeys(stop for each in rows.values() for stop in each.stop_ids))
    held_out = _held_out(plan, tokenizer, sources, console)
    digest, base = batches.digest(), base_model(plan)
    # Problems of several sources have a path of their own.
    return Prepared(tokenizer, batches, stop_ids, digest, base, held_out, sources[0].held_out)


def _held_out(
    plan: Plan, tokenizer: PreTrainedTokenizerFast, sources: Sequence[Source], console: Console
) -> dict[str, TokenizedDataset] | None:
    """The rows of the held-out loss, rendered like those of training; None where it is not measured."""
    section, data = plan.recipe.eval, plan.recipe.data
    setting, value = "data.validation", str(data.validation)
    if section.loss_path is not None:
        setting, value = "eval.loss_path", section.loss_path
        records = open_records(value, section.subset, section.split, section.loss_records, setting)
        sources = [Source("", data, records, records)]
    elif not data.validation:
        return None
    rows = {}
    for source in sources:
        try:
            rows[source.name], counts = source.held_out_rows(tokenizer, console.print)
        except ProblemsError as error:
            # Columns and lengths are the same settings for all records; where they come from is not.
            problems = [
                replace(problem, setting=setting, value=value) if problem.setting == "data.path" else problem
                for problem in error.problems
            ]
            raise ProblemsError(problems_of_source(problems, source.name)) from error
        console.print(f"Held out{f' of {source.name}' if source.name else ''}: {counts}.")
    return rows


def _tokenizer(plan: Plan, folder: RunFolder, sources: Sequence[Source]) -> PreTrainedTokenizerFast:
    """The recipe's tokenizer; a run that goes on reads back the one that it has kept."""
    model = plan.recipe.model
    if resumes(plan, folder):
        if model.tokenizer == "train":
            return PreTrainedTokenizerFast.from_pretrained(str(folder.assets))
        # It has what the recipe adds: a template's file may have changed since.
        return load_tokenizer(ModelSection(tokenizer=str(folder.assets)))
    if model.tokenizer != "train":
        return load_tokenizer(model)
    return make_tokenizer(model, texts_of_sources(sources), plan.facts.vocab_size)


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
