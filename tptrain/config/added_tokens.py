"""How many ids a tokenizer comes to with the tokens that a recipe adds, from its files alone.

A plan has to know, since the vocabulary may grow by them, and loads no tokenizer. The rule is that of the
tokenizers library: a token that is not there gets the id behind the vocabulary and all added tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tptrain.config.chat_templates import asked_tokens
from tptrain.config.checkpoint_config import cached_hub_file
from tptrain.config.schema import ModelSection, Recipe
from tptrain.errors import refuse
from tptrain.hf_files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from tptrain.untrusted import read_json


def find_num_ids(recipe: Recipe, environ: Mapping[str, str] = os.environ) -> int:
    """How many ids the recipe's tokenizer needs with its added tokens; 0 where it adds none.

    0 as well for a tokenizer that is made to fit the vocabulary, and where there is none to look for.
    Raises ProblemsError for a chat template that is not to be had, and a tokenizer.json that is not at hand.
    """
    model, tokens = recipe.model, asked_tokens(recipe.model)
    setting, source = tokenizer_source(model)
    if not tokens or source is None:
        return 0
    path = _tokenizer_file(recipe, source, environ)
    if path is None:
        rule = "needs the tokenizer's tokenizer.json at hand, which tells how many ids there are"
        other = f"none in {setting}={source} on this machine"
        fix = f"the folder of a tokenizer with {TOKENIZER_FILE}, or no tokens that are added"
        raise refuse("model.add_tokens", ",".join(tokens), rule, other, fix)
    content = read_json(path, setting)
    config_file = path.parent / TOKENIZER_CONFIG_FILE
    config = read_json(config_file, setting) if config_file.exists() else {}
    try:
        return num_ids(content, (*_listed_beside(config), *tokens))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        other = f"{path}: {type(error).__name__} {error}"
        fix = "an intact copy of it"
        raise refuse(setting, source, "must hold a tokenizer.json as usual", other, fix) from error


def tokenizer_source(model: ModelSection) -> tuple[str, str | None]:
    """The setting that names the tokenizer, and the folder or hub id; None for one that is to be made."""
    if model.tokenizer == "pretrained":
        return "model.pretrained", model.pretrained
    return "model.tokenizer", None if model.tokenizer == "train" else model.tokenizer


def tokenizer_is_on_the_hub_only(recipe: Recipe, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether tokens are added to a tokenizer of the hub of which no tokenizer.json has been downloaded."""
    _, source = tokenizer_source(recipe.model)
    if source is None or not asked_tokens(recipe.model) or Path(source).expanduser().exists():
        return False
    return _tokenizer_file(recipe, source, environ) is None


def _tokenizer_file(recipe: Recipe, source: str, environ: Mapping[str, str]) -> Path | None:
    """tokenizer.json of a folder, a step's run, or the hub's cache; else what the run to go on with kept."""
    folder = Path(source).expanduser()
    assets = folder.parent.parent / "assets"
    if folder.parent.name == "checkpoints" and assets.is_dir():
        folder = assets
    if folder.is_dir():
        found = folder / TOKENIZER_FILE
        return found if found.exists() else None
    kept = Path(recipe.run_folder).expanduser() / "assets" / TOKENIZER_FILE
    cached = cached_hub_file(source, TOKENIZER_FILE, environ)
    return cached or (kept if recipe.resume != "never" and kept.is_file() else None)


def _listed_beside(config: Mapping[str, Any]) -> list[str]:
    """Tokens that a tokenizer_config.json adds to those of tokenizer.json."""
    listed = config.get("added_tokens_decoder") or {}
    return [listed[index]["content"] for index in sorted(listed, key=int)]


def num_ids(content: Mapping[str, Any], tokens: Iterable[str]) -> int:
    """The largest id and one, once these tokens are added. content: of a tokenizer.json."""
    vocab = content["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: pairs of a piece and its score, in the order of their ids
        vocab = {piece: index for index, (piece, _) in enumerate(vocab)}
    added: dict[str, int] = {each["content"]: each["id"] for each in content.get("added_tokens") or ()}
    for token in tokens:
        if token not in added:
            added[token] = vocab.get(token, max(len(vocab), max(added.values(), default=-1) + 1))
    return 1 + max(*vocab.values(), *added.values())
