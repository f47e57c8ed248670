"""Runs on one virtual device, in one process."""

import pytest

from tests.device_process import open_devices
from tests.small_run import write_pretrained, write_records


@pytest.fixture(scope="session", autouse=True)
def _devices():
    open_devices(1)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    return write_pretrained(tmp_path_factory.mktemp("pretrained") / "model")


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records") / "train.jsonl")
