"""Exporting a saved checkpoint again: what most tests of the export start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.weights.small_llama import read_config, saved_table
from tptrain.family import ParamRow
from tptrain.weights import ReadBlocks, SafetensorsSource, blocks_of, export_folder

Read = Callable[[ParamRow], torch.Tensor]


def reader(folder: Path) -> Read:
    source = SafetensorsSource(folder, saved_table(folder))
    return lambda row: source.read(row, tuple(slice(None) for _ in row.size))


def block_reader(folder: Path, max_bytes: int = 3000) -> ReadBlocks:
    """Blocks of a few rows, so that most rows have several and the last is smaller."""
    source = SafetensorsSource(folder, saved_table(folder))
    return lambda row: source.read_blocks(row, max_bytes)


def export(source: Path, out: Path, read: Read | None = None, **options: Any) -> Path:
    """Export `source` to `out`, by blocks or by what `read` gives for each row."""
    read_blocks = blocks_of(read) if read else block_reader(source)
    return export_folder(out, saved_table(source), read_config(source), read_blocks, **options)
