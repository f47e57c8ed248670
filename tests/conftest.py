"""Fixtures for tests of whole runs. Their imports are inside, so that other tests load no framework."""

import pytest


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """The folder of a small random Llama with a tokenizer."""
    from tests.small_run import write_pretrained

    return write_pretrained(tmp_path_factory.mktemp("pretrained") / "model")


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    """A JSONL file of word problems."""
    from tests.small_run import write_records

    return write_records(tmp_path_factory.mktemp("records") / "train.jsonl")
