"""How much the peak memory of this process grows, step by step; prints JSON. Run as a program."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tests.weights.killed import CONFIG
from tptrain.family.table import ParamRow, matrix
from tptrain.weights import SafetensorsSource, export_folder

BLOCK_BYTES = 4 * 2**20
# 1.2 GB of float32: 600 MB as bfloat16, in two files.
EXPORTED = [matrix(f"w{number}", ("vocab", "embed"), (30_000, 2_000)) for number in range(5)]
# 1 GiB of bfloat16 that takes no room on the disk.
SPARSE = matrix("w", ("vocab", "embed"), (65_536, 8_192))


def made_on_demand(row: ParamRow) -> Iterator[torch.Tensor]:
    rows, columns = row.size
    step = BLOCK_BYTES // (4 * columns)
    for first in range(0, rows, step):
        yield torch.ones(min(step, rows - first), columns)


def write_sparse(folder: Path) -> None:
    end = SPARSE.num_elements * 2
    header = json.dumps({"w": {"dtype": "BF16", "shape": SPARSE.size, "data_offsets": [0, end]}}).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + end)


def stream(source: SafetensorsSource) -> None:
    rows = sum(len(block) for block in source.read_blocks(SPARSE, BLOCK_BYTES))
    assert rows == SPARSE.size[0]


def slices(source: SafetensorsSource) -> None:
    for first in range(0, SPARSE.size[0], 2048):
        source.read(SPARSE, (slice(first, first + 2048), slice(None)))


def kept_by_slices(source: SafetensorsSource) -> dict[str, int]:
    """Bytes of memory that no file backs, for two small parts (2 MB) and for an eighth (128 MiB)."""
    before = _status("RssAnon")
    parts = [(slice(0, 100), slice(None)), (slice(None), slice(3, 5)), (slice(0, 8192), slice(None))]
    kept = [source.read(SPARSE, part) for part in parts[:2]]
    small = _status("RssAnon") - before
    kept.append(source.read(SPARSE, parts[2]))
    return {"parts": small, "eighth": _status("RssAnon") - before - small}


def growth(step: Callable[[], object]) -> int:
    """Bytes by which the peak of this process's resident memory exceeds what it had before the step."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def main(folder: Path) -> None:
    write_sparse(folder / "sparse")
    source = SafetensorsSource(folder / "sparse", [SPARSE])
    out = folder / "out"
    found = {
        "export": growth(
            lambda: export_folder(out, EXPORTED, CONFIG, made_on_demand, max_shard_bytes=400_000_000)
        ),
        "read_blocks": growth(lambda: stream(source)),
        "slices": growth(lambda: slices(source)),
        **kept_by_slices(source),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
