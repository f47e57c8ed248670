"""Conversions both ways under a limit on this process's memory at which the model does not fit into it.

Run as a program with a folder that does not exist yet; prints JSON.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from tools import convert_ckpt
from tptrain.backends.base import TensorSource
from tptrain.ckpt.importing import write_step
from tptrain.ckpt.reading import StepReader
from tptrain.family import ParamRow, facts_from_config, parameter_table, stored_rows
from tptrain.weights.hf_json import complete_config, write_json

# 640 MB of float32, half of it as bfloat16; an embedding of 131 MB, of which a block is a thirtieth.
LARGE = {"vocab_size": 16_000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8}
SMALL = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
# Beyond what the process has already when everything is imported and has run once.
LIMIT_BYTES = 450 * 2**20


class Waves(TensorSource):
    """Weights that are cheap to make and differ by row."""

    def read(self, row: ParamRow, index: tuple[slice, ...]) -> torch.Tensor:
        shape = [part.stop - part.start for part in index]
        rows = torch.arange(index[0].start, index[0].stop, dtype=torch.float32)
        wave = torch.sin(rows + len(row.name)) * 0.02
        return wave.reshape(-1, *(1 for _ in shape[1:])).expand(shape).contiguous()


def write_run(folder: Path, sizes: dict[str, int]) -> Path:
    """A run with the step 1, without a tokenizer; its config is that of a model that was converted."""
    fields = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, **sizes}
    config = complete_config({**fields, "tie_word_embeddings": True}, "float32")
    table = parameter_table(facts_from_config(config))
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "assets").mkdir()
    write_json(folder / "assets" / "config.json", config)
    run: dict[str, Any] = {"step": 1, "cursor": 0, "hf_config": config, "source": {"name": "waves"}}
    write_step(folder / "checkpoints" / "1", table, Waves(), run)
    return folder


def load_whole(run: Path) -> str:
    """Hold all weights of the step at once; says how that ended."""
    reader = StepReader(run / "checkpoints" / "1")
    rows = stored_rows(parameter_table(facts_from_config(reader.run["hf_config"])))
    try:
        held = [block for row in rows for block in reader.read_blocks(row)]
    except (MemoryError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"held {sum(block.nbytes for block in held)} bytes"


def both_ways(run: Path) -> list[int]:
    """To a model folder and from there to a checkpoint again; returns the exit codes."""
    back = run.parent / f"{run.name}-back"
    commands = [[run, back], [back, run.parent / f"{run.name}-again"]]
    return [convert_ckpt.main([str(word) for word in words]) for words in commands]


def memory(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def main(folder: Path) -> None:
    convert_ckpt.prepare_process()
    folder.mkdir()
    large = write_run(folder / "large", LARGE)
    without_limit = load_whole(large)
    assert both_ways(write_run(folder / "small", SMALL)) == [0, 0]
    before = memory("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (before + LIMIT_BYTES,) * 2)
    found = {
        "without_limit": without_limit,
        "whole": load_whole(large),
        "codes": both_ways(large),
        "step_bytes": sum(path.stat().st_size for path in large.rglob("*") if path.is_file()),
        "peak_data": memory("VmData") - before,
        "peak_resident": memory("VmHWM"),
    }
    shutil.rmtree(folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
