"""Real records and real tokenizers for the tests of the data package."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data import tokenizers_of_all_kinds as kinds
from tptrain.data.word_problems import training_records


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """The folder with GSM8K's train.jsonl and test.jsonl."""
    folder = os.environ.get("TPTRAIN_GSM8K")
    if folder:
        return Path(folder)
    if os.environ.get("CI") == "true":
        pytest.fail("TPTRAIN_GSM8K must name the folder of GSM8K's train.jsonl and test.jsonl in CI")
    pytest.skip("TPTRAIN_GSM8K does not name the folder of GSM8K's train.jsonl and test.jsonl")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Text to train tokenizers on, with letters of several bytes."""
    records = training_records(400, seed=3)
    plain = [f"Question: {record['question']}\nAnswer: {record['answer']}" for record in records]
    return [*plain, *["Crème brûlée für 3 Gäste, naïve façade", "price: 12 €, 日本語"] * 20]


@pytest.fixture(scope="session", params=sorted(kinds.EXACT))
def exact_tokenizer(request: pytest.FixtureRequest, texts: list[str]) -> PreTrainedTokenizerFast:
    """Each kind of tokenizer under which prompts and completions can be told apart."""
    make: Callable[[list[str]], PreTrainedTokenizerFast] = kinds.EXACT[request.param]
    return make(texts)


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    return kinds.byte_level_with_bos(texts)
