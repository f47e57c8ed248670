"""What runs in a process that is killed: exports of a tiny model, and death at a chosen step of one.

Imports no more than the export itself, because processes are started from it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch

from tptrain.family import ParamRow, facts_from_config, parameter_table
from tptrain.weights import ReadBlocks, blocks_of, export_folder

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 6,
    "intermediate_size": 10,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
TABLE = parameter_table(facts_from_config(CONFIG))

# Whatever changes a file system raises one of these audit events before it does.
_CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def export_ones(out: Path, factor: float, **options: Any) -> Path:
    """An export whose every weight is `factor`, in three files."""
    read = blocks_of(lambda row: torch.full(row.size, factor))
    return export_with(out, read, **options)


def export_with(out: Path, read: ReadBlocks, **options: Any) -> Path:
    return export_folder(out, TABLE, CONFIG, read, max_shard_bytes=300, **options)


def export_and_die(out: Path, factor: float, step: int) -> None:
    """Replace `out` by an export, and be killed just before its change number `step` of the file system."""
    changes = iter(range(step))

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if event in _CHANGES and writes and next(changes, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    export_ones(out, factor, overwrite=True)


def export_and_hang(out: Path, started: Event) -> None:
    """Write the first files of an export to `out`, say so, and wait to be killed."""

    def read(row: ParamRow) -> Iterator[torch.Tensor]:
        yield torch.ones(row.size)
        if row is TABLE[-1]:
            while not list(out.parent.glob(f"{out.name}.partial-*/*/*.safetensors")):
                time.sleep(0.01)
            started.set()
            time.sleep(3600)

    export_with(out, read)
