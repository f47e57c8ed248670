"""What a run reads before it touches a device, records and tokenizer and weights, and the assets it keeps."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerFast

from tptrain.backends.base import TensorSource
from tptrain.ckpt.base_model import BaseModel, base_model
from tptrain.ckpt.steps import is_step_folder
from tptrain.config.plan import Plan
from tptrain.data.batches import Batches
from tptrain.data.render import texts_of
from tptrain.data.sources import Records, open_records
from tptrain.data.token_cache import tokenized
from tptrain.data.tokenizer import check_tokenizer, load_tokenizer, train_tokenizer
from tptrain.errors import raise_if_any
from tptrain.family.lora import model_rows
from tptrain.jaxside.random_init import RandomSource
from tptrain.train.folder import RunFolder, resumes
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

    stop_ids:    what ends an answer, in the records that are trained on.
    data_digest: `Batches.digest`: what a run that goes on compares.
    base:        the model below the adapters, which it compares as well; None without adapters.
    """

    tokenizer: PreTrainedTokenizerFast
    batches: Batches
    stop_ids: tuple[int, ...]
    data_digest: str
    base: BaseModel | None


def prepare(plan: Plan, folder: RunFolder, console: Console) -> Prepared:
    """Read records and tokenizer; tokenise."""
    recipe = plan.recipe
    data = recipe.data
    records = open_records(data.path, data.subset, data.split, data.max_records)
    tokenizer = _tokenizer(plan, folder, records)
    raise_if_any(check_tokenizer(tokenizer, plan.facts.vocab_size))
    dataset, counts = tokenized(records, tokenizer, data, console.print)
    console.print(f"Data: {counts}.")
    batches = Batches.of_run(dataset, data, recipe.optim.accumulation, recipe.schedule)
    return Prepared(tokenizer, batches, dataset.stop_ids, batches.digest(), base_model(plan))


def _tokenizer(plan: Plan, folder: RunFolder, records: Records) -> PreTrainedTokenizerFast:
    """The recipe's tokenizer; a run that goes on reads back the one that it has kept."""
    model = plan.recipe.model
    if resumes(plan, folder):
        if model.tokenizer == "train":
            return PreTrainedTokenizerFast.from_pretrained(str(folder.assets))
        return load_tokenizer(replace(model, tokenizer=str(folder.assets)))
    if model.tokenizer != "train":
        return load_tokenizer(model)
    return train_tokenizer(texts_of(records, plan.recipe.data), plan.facts.vocab_size)


def weight_source(plan: Plan) -> TensorSource | Path:
    """Where the weights of the model come from: a step folder, safetensors files, or a random generator.

    Adapters are not among them: those of a new run are random, those of one that goes on in its checkpoint.
    """
    pretrained = plan.recipe.model.pretrained
    if pretrained is None:
        return RandomSource(plan.recipe.seed, plan.facts.initializer_range)
    path = Path(pretrained).expanduser()
    return path if is_step_folder(path) else SafetensorsSource(pretrained, model_rows(plan.table))


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
    collect_assets(folder.assets, plan.hf_config, tokenizer, *source, stops=stop_ids)


def _assets_of(source: str, setting: str, patterns: tuple[str, ...]) -> Path:
    """The folder with the config and tokenizer of a checkpoint; a step of a run keeps them in its assets."""
    path = Path(source).expanduser()
    return path.parent.parent / "assets" if is_step_folder(path) else local_folder(source, setting, patterns)
