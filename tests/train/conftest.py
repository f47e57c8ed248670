"""Runs on the plain-PyTorch backend."""

import pytest
import torch

from tests.small_run import write_pretrained, write_records


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tensors this small lose more time in handing work over than they gain from a second core."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    return write_pretrained(tmp_path_factory.mktemp("pretrained") / "model")


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records") / "train.jsonl")
