"""Writing a folder of adapters as PEFT has it: adapter_config.json, one safetensors file, the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tptrain.family.table import ParamRow
from tptrain.hf_files import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from tptrain.weights.hf_folder import Shard, write_folder
from tptrain.weights.row_stream import ReadBlocks


def export_adapter_folder(
    out: str | Path,
    rows: Sequence[ParamRow],
    peft_config: Mapping[str, Any],
    read_blocks: ReadBlocks,
    assets: Path | None = None,
    dtype: str = "bfloat16",
    setting: str = "export.path",
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    dtype_setting: str = "export.dtype",
) -> Path:
    """Write the folder `out` that PEFT and vLLM load beside the model that was adapted; returns its path.

    rows: of the adapters alone. The rest is as for `export_folder`.
    """
    shards = (Shard(ADAPTER_FILE, tuple(rows)),)
    files = {ADAPTER_CONFIG_FILE: dict(peft_config)}
    return write_folder(
        out, shards, files, read_blocks, assets, dtype, setting, overwrite, progress, dtype_setting
    )
