"""Tokenizers: trained alike each time, loaded with clear errors, checked against the model."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.tokenizers_of_all_kinds import byte_level_without_bos
from tptrain.config.schema import ModelSection
from tptrain.data.tokenizer import (
    BOS,
    EOS,
    PAD,
    check_tokenizer,
    load_tokenizer,
    padding_id,
    train_tokenizer,
)

TRAIN = """
from tptrain.data.tokenizer import train_tokenizer
from tptrain.data.word_problems import training_records
texts = [f"{record['question']}\\n{record['answer']}" for record in training_records(300, 1)]
print(train_tokenizer(texts, 512).backend_tokenizer.to_str())
"""


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("has 1234 coins").input_ids)
    assert tokens[tokens.index("1") :][:4] == ["1", "2", "3", "4"]
    assert not [token for token in tokenizer.get_vocab() if len(token) > 1 and any(map(str.isdigit, token))]


@pytest.mark.parametrize("text", ["48/2 = 24\n#### 24", " two  spaces", "Crème brûlée 日本語 🙂", "\t\n", ""])
def test_any_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_training_is_the_same_in_every_process() -> None:
    digests = set()
    for seed in ("1", "2"):
        made = subprocess.run(
            [sys.executable, "-c", TRAIN],
            capture_output=True,
            check=True,
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed},
        )
        digests.add(hashlib.sha256(made.stdout).hexdigest())
    assert len(digests) == 1


def test_few_texts_give_fewer_tokens() -> None:
    small = train_tokenizer(["Ann has 3 coins."], 2000)
    assert 259 < len(small) < 300
    assert not check_tokenizer(small, 2000)


def test_vocabulary_is_never_exceeded(texts: list[str]) -> None:
    for vocab_size in (259, 300, 512):
        made = train_tokenizer(texts, vocab_size)
        assert len(made) == vocab_size
        assert not check_tokenizer(made, vocab_size)
        assert check_tokenizer(made, vocab_size - 1)


def test_saved_and_loaded_tokenizer_is_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelSection(tokenizer=str(tmp_path)))
    text = "Question: Ann has 48 coins.\nAnswer:"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token, loaded.pad_token) == (EOS, PAD)
    assert loaded.chat_template == tokenizer.chat_template


def test_checkpoints_own_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(ModelSection(pretrained=str(tmp_path))).get_vocab() == tokenizer.get_vocab()


def test_step_of_a_run_has_its_tokenizer_in_the_run(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    step = tmp_path / "checkpoints" / "300"
    step.mkdir(parents=True)
    tokenizer.save_pretrained(tmp_path / "assets")
    assert load_tokenizer(ModelSection(pretrained=str(step))).get_vocab() == tokenizer.get_vocab()


def test_pad_id_is_eos_where_there_is_no_pad_token(
    texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    assert padding_id(tokenizer) == tokenizer.pad_token_id
    without = byte_level_without_bos(texts)
    assert without.pad_token_id is None
    assert padding_id(without) == without.eos_token_id


def test_added_tokens_count_as_ids(texts: list[str]) -> None:
    made = train_tokenizer(texts, 300)
    made.add_tokens(["<|extra|>"])
    (problem,) = check_tokenizer(made, 300)
    assert problem.other == "vocab_size=300, the id of '<|extra|>' is 300"
    assert not check_tokenizer(made, 301)
