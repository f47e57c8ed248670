"""How many ids a plan counts: what the tokenizers library comes to, for every kind of tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from samples import SMALL_LLAMA, small_recipe
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.data.tokenizers_of_all_kinds import EXACT
from tptrain.config import ModelSection
from tptrain.config.added_tokens import find_num_ids, tokenizer_is_on_the_hub_only
from tptrain.config.chat_templates import CHAT_TEMPLATES, asked_tokens
from tptrain.data.tokenizer import load_tokenizer
from tptrain.errors import ProblemsError

TEXTS = ["Question: Ann has 48 coins, Ben has 12.\nAnswer: 60", "Crème brûlée, 日本語"] * 9
NEW = ("<|one|>", "ha", "<|two|>", "</s>")  # "ha": a piece of some vocabularies; "</s>": there already
NOWHERE = {"HF_HOME": "/nowhere"}


def unigram(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    return _made(models.Unigram(), trainers.UnigramTrainer(**_OPTIONS), texts)


def wordpiece(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    model = models.WordPiece(unk_token="<unk>")  # type: ignore[call-arg]
    return _made(model, trainers.WordPieceTrainer(**_OPTIONS), texts)


_OPTIONS: dict[str, Any] = {"vocab_size": 120, "special_tokens": ["</s>", "<unk>"], "show_progress": False}


def _made(model: Any, trainer: Any, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


KINDS: dict[str, Callable[[Sequence[str]], PreTrainedTokenizerFast]] = {
    **EXACT,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


def ids_and_loaded(folder: Path, model: ModelSection) -> tuple[int, dict[str, int]]:
    """What a plan counts for a tokenizer, and what loading it gives."""
    model = replace(model, tokenizer=str(folder))
    return find_num_ids(small_recipe(model=model), NOWHERE), load_tokenizer(model).get_vocab()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beyond", [0, 7], ids=["as made", "with tokens far behind"])
def test_it_is_what_the_library_gives(kind: str, beyond: int, tmp_path: Path) -> None:
    made = KINDS[kind](TEXTS)
    made.add_tokens([f"<|spare {number}|>" for number in range(beyond)])
    made.save_pretrained(tmp_path)
    section = ModelSection(config=dict(SMALL_LLAMA), add_tokens=NEW, chat_template="chatml")
    counted, vocab = ids_and_loaded(tmp_path, section)
    assert counted == max(vocab.values()) + 1 > len(made)
    assert {"<|im_start|>", *NEW} <= set(vocab)


def test_tokens_listed_beside_tokenizer_json_count(tmp_path: Path) -> None:
    made = KINDS["byte level, no BOS"](TEXTS)
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    count = len(made)
    token = {"content": "<|listed|>", "special": True, "normalized": False}
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    config["added_tokens_decoder"] = {str(count): {**token, **flags}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    counted, vocab = ids_and_loaded(tmp_path, ModelSection(add_tokens=("<|new|>",)))
    assert counted == max(vocab.values()) + 1 == count + 2


def test_nothing_is_read_where_nothing_is_added() -> None:
    model = ModelSection(tokenizer="/no/such/folder", pretrained="/nor/this")
    assert find_num_ids(small_recipe(model=model), NOWHERE) == 0
    assert find_num_ids(small_recipe(model=replace(model, chat_template="turns")), NOWHERE) == 0
    made = ModelSection(tokenizer="train", config=dict(SMALL_LLAMA), chat_template="chatml")
    assert find_num_ids(small_recipe(model=made), NOWHERE) == 0


def test_a_hub_tokenizer_is_read_from_the_cache_or_refused(tmp_path: Path) -> None:
    recipe = small_recipe(model=ModelSection(pretrained="org/model", chat_template="chatml"))
    environ = {"HF_HUB_CACHE": str(tmp_path)}
    assert tokenizer_is_on_the_hub_only(recipe, environ)
    with pytest.raises(ProblemsError, match=r"add_tokens=<\|im_start\|>,<\|im_end\|>: needs the tokenizer's"):
        find_num_ids(recipe, environ)
    cache = tmp_path / "models--org--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    made = KINDS["byte level, BOS"](TEXTS)
    made.save_pretrained(cache / "snapshots" / "abc")
    assert not tokenizer_is_on_the_hub_only(recipe, environ)
    assert find_num_ids(recipe, environ) == len(made) + 2


def test_a_run_that_goes_on_reads_the_tokenizer_that_it_has_kept(tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    made = KINDS["byte level, BOS"](TEXTS)
    made.save_pretrained(base)
    made.add_tokens(list(CHAT_TEMPLATES["chatml"].tokens), special_tokens=True)
    made.save_pretrained(run / "assets")
    recipe = small_recipe(
        model=ModelSection(tokenizer=str(base), chat_template="chatml"), output_dir=str(run), resume="auto"
    )
    before = find_num_ids(recipe, NOWHERE)
    shutil.rmtree(base)
    assert find_num_ids(recipe, NOWHERE) == before == len(made)


def test_tokens_of_recipe_and_template_are_asked_for_once() -> None:
    section = ModelSection(add_tokens=("<|a|>", "<|im_end|>"), chat_template="chatml")
    assert asked_tokens(section) == ("<|a|>", "<|im_end|>", "<|im_start|>")
