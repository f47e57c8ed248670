"""One bad input: what triggers it, and what its error must say in all five parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.weights.small_llama import saved_model, saved_table
from tptrain.weights import SafetensorsSource

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARDED = "20KB"
WEIGHTS = "model.pretrained"


@dataclass(frozen=True)
class BadInput:
    """One row: `trigger(tmp_path)` raises a ProblemsError with one problem of this setting.

    value: the end of the value that is shown. rule, other, fix: what these parts contain.
    """

    name: str
    trigger: Callable[[Path], object]
    setting: str
    value: str
    rule: str
    other: str
    fix: str


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
