"""A conversion under a limit on this process's memory at which the model does not fit into it, and one back.

Run as a program with a folder that does not exist yet; prints JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from tests.weights.memory_growth import growth
from tools import convert_ckpt
from tptrain.backends.base import TensorSource
from tptrain.ckpt.importing import write_step
from tptrain.ckpt.reading import StepReader
from tptrain.family import ParamRow, facts_from_config, parameter_table, stored_rows
from tptrain.weights.hf_json import complete_config, write_json

# 640 MB of float32, half of it as bfloat16; the embedding alone has 262 MB.
LARGE = {"vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2}
SMALL = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
# Beyond what the process has already when everything is imported and has run once.
LIMIT_BYTES = 400 * 2**20
SHARD_GB = 0.1


class Waves(TensorSource):
    """Weights that are cheap to make and differ by row."""

    def read(self, row: ParamRow, index: tuple[slice, ...]) -> torch.Tensor:
        shape = [part.stop - part.start for part in index]
        rows = torch.arange(index[0].start, index[0].stop, dtype=torch.float32)
        wave = torch.sin(rows + len(row.name)) * 0.02
        return wave.reshape(-1, *(1 for _ in shape[1:])).expand(shape).contiguous()


def write_run(folder: Path, sizes: dict[str, int]) -> None:
    """A run with the step 1, without a tokenizer; its config is that of a model that was converted."""
    fields = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, **sizes}
    config = complete_config({**fields, "tie_word_embeddings": True}, "float32")
    table = parameter_table(facts_from_config(config))
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "assets").mkdir()
    write_json(folder / "assets" / "config.json", config)
    run: dict[str, Any] = {"step": 1, "cursor": 0, "hf_config": config, "source": {"name": "waves"}}
    write_step(folder / "checkpoints" / "1", table, Waves(), run)


def load_whole(run: Path) -> str:
    """Hold all weights of the step at once; says how that ended."""
    reader = StepReader(run / "checkpoints" / "1")
    rows = stored_rows(parameter_table(facts_from_config(reader.run["hf_config"])))
    try:
        held = [block for row in rows for block in reader.read_blocks(row)]
    except (MemoryError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"held {sum(block.nbytes for block in held)} bytes"


def limit_memory(num_bytes: int) -> None:
    """Let this process have so many bytes of memory of its own, private mappings of files included."""
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, resource.RLIM_INFINITY))


def to_hf(run: Path) -> int:
    return convert_ckpt.main([str(run), f"{run}-folder", "--max-shard-gb", str(SHARD_GB)])


def from_hf(run: Path) -> int:
    return convert_ckpt.main([f"{run}-folder", f"{run}-again"])


def memory(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def main(folder: Path) -> None:
    convert_ckpt.prepare_process()
    folder.mkdir()
    large, small = folder / "large", folder / "small"
    for run, sizes in ((large, LARGE), (small, SMALL)):
        # In a process of its own: what it frees would stay this one's, beyond the limit.
        writer = multiprocessing.get_context("fork").Process(target=write_run, args=(run, sizes))
        writer.start()
        writer.join()
    assert (to_hf(small), from_hf(small)) == (0, 0)  # so that threads and their memory are there
    limit = memory("VmData") + LIMIT_BYTES
    limit_memory(limit)
    found: dict[str, Any] = {"to_hf": to_hf(large)}
    # The other way, the library maps the files such that they count against the limit, though that takes no
    # memory: so what the process really takes is measured there.
    limit_memory(resource.RLIM_INFINITY)
    found["from_hf_growth"] = growth(lambda: from_hf(large))
    limit_memory(limit)
    found["whole"] = load_whole(large)
    shutil.rmtree(folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
