"""One bad input: what triggers it, and what its error must say in all five parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.bad_input import BadInput as BadInput
from tests.weights.small_llama import saved_model, saved_table
from tptrain.weights import SafetensorsSource

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARDED = "20KB"
WEIGHTS = "model.pretrained"


def load(folder: Path) -> SafetensorsSource:
    return SafetensorsSource(folder, saved_table(folder))


def broken(
    change: Callable[[Path], object], tied: bool = False, shards: str = "1GB"
) -> Callable[[Path], object]:
    """Save a checkpoint to `in`, break it, and load it."""

    def trigger(tmp_path: Path) -> object:
        folder = tmp_path / "in"
        saved_model(folder, tied, max_shard_size=shards)
        change(folder)
        return load(folder)

    return trigger
