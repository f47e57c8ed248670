"""Whole runs on one virtual device, in one process."""

import pytest

from tests.device_process import open_devices


@pytest.fixture(scope="session", autouse=True)
def _devices():
    open_devices(1)
