"""Runs on the plain-PyTorch backend."""

import pytest

from tests.small_run import write_pretrained, write_records


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    return write_pretrained(tmp_path_factory.mktemp("pretrained") / "model")


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records") / "train.jsonl")
