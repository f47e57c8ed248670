"""Whole runs on the plain-PyTorch backend."""

import pytest
import torch

from tests.small_run import small_recipe
from tptrain.config import DataSection, Recipe, SaveSection, ScheduleSection


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tensors this small lose more time in handing work over than they gain from a second core."""
    torch.set_num_threads(1)


@pytest.fixture
def recipe(pretrained, records, tmp_path):
    def make(**top) -> Recipe:
        settings = {
            "topology": "cpu-1",
            "backend": "torch",
            "data": DataSection(path=str(records), preset="gsm8k", seq_len=112, batch_rows=4, max_records=38),
            "schedule": ScheduleSection(max_steps=4),
            "save": SaveSection(every_steps=2),
            "output_dir": str(tmp_path / "run"),
        }
        return small_recipe(pretrained, records, **{**settings, **top})

    return make
