"""Arrays that a mesh has split: several files per row of chunks, edges inside of files, damage in any."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
import torch

from tests.convert.models import Run, assert_same_bits, run_tool, tensors_in
from tptrain.ckpt import plain_chunks
from tptrain.ckpt.arrays import create_array, open_array, to_numpy
from tptrain.ckpt.digests import FileDigest, digest_file
from tptrain.ckpt.host_array import HostArray, Pieces, array_item_handler
from tptrain.ckpt.plain_chunks import ChunkDamage, plain_array
from tptrain.ckpt.publishing import publish
from tptrain.ckpt.steps import read_run

# (shape, chunks): a vocabulary in 4 parts, split columns, both, edges in both dims, one dim, one chunk.
SPLITS = [
    ((131, 48), (33, 48)),
    ((131, 48), (131, 24)),
    ((131, 48), (33, 24)),
    ((20, 47), (7, 10)),
    ((48,), (13,)),
    ((20, 9), (20, 9)),
    ((6, 5, 4), (4, 2, 3)),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def write_array(item: Path, tensor: torch.Tensor, chunks: tuple[int, ...]) -> dict[str, FileDigest]:
    """Write an array `w` through tensorstore; returns the digests of its chunks."""
    values = to_numpy(tensor)
    store = create_array(item / "w", values.shape, values.dtype, chunks, ts.Context())
    store.write(values).result()
    files = [path for path in (item / "w").iterdir() if path.name != ".zarray"]
    return {f"{item.name}/w/{path.name}": digest_file(path) for path in files}


def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)


def blocks_of(item: Path, expected: Mapping[str, FileDigest] | None) -> list[torch.Tensor]:
    array = plain_array(item, "w")
    assert array is not None
    return list(array.blocks(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "chunks"), SPLITS, ids=str)
def test_blocks_hold_what_tensorstore_holds(
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With blocks of 1 kB, so that a chunk has several and most end amid one."""
    monkeypatch.setattr(plain_chunks, "BLOCK_BYTES", 1000)
    tensor = values(shape, dtype)
    expected = write_array(tmp_path / "params", tensor, chunks)
    blocks = blocks_of(tmp_path / "params", expected)
    assert_same_bits({"w": torch.cat(blocks)}, {"w": tensor})
    largest = max(block.nbytes for block in blocks)
    assert largest <= 1000 or max(len(block) for block in blocks) == 1
    assert torch.equal(torch.cat(blocks_of(tmp_path / "params", None)), tensor)


@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("shape", "chunks"), SPLITS, ids=str)
def test_a_bit_in_any_file_is_found(
    shape: tuple[int, ...], chunks: tuple[int, ...], position: float, tmp_path: Path
) -> None:
    """Also in what fills up a chunk that reaches over the edge of the array."""
    item = tmp_path / "params"
    expected = write_array(item, values(shape, torch.float32), chunks)
    for name in expected:
        path = tmp_path / name
        intact = path.read_bytes()
        content = bytearray(intact)
        content[int(position * (len(content) - 1))] ^= 1
        path.write_bytes(content)
        with pytest.raises(ChunkDamage) as caught:
            blocks_of(item, expected)
        assert [damage.path for damage in caught.value.damages] == [name]
        path.write_bytes(intact)
    assert blocks_of(item, expected)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("cut", [None, 3])
def test_a_file_that_is_gone_or_short(cut: int | None, known: bool, tmp_path: Path) -> None:
    """A zarr reader would fill in zeros. Without digests to compare with it is found all the same."""
    item = tmp_path / "params"
    expected = write_array(item, values((20, 9), torch.float32), (7, 9))
    file = item / "w" / "1.0"
    content = file.read_bytes()
    file.unlink()
    if cut is not None:
        file.write_bytes(content[:-cut])
    if cut is None:
        assert not open_array(item, "w")[7:14].read().result().any()
    with pytest.raises(ChunkDamage, match=r"params/w/1\.0"):
        blocks_of(item, expected if known else None)


def test_a_file_that_the_manifest_lacks(tmp_path: Path) -> None:
    expected = write_array(tmp_path / "params", values((20, 9), torch.float32), (7, 9))
    del expected["params/w/2.0"]
    with pytest.raises(ChunkDamage, match=r"params/w/2\.0 \(not in the manifest\)"):
        blocks_of(tmp_path / "params", expected)


@pytest.mark.parametrize(
    "change",
    [
        ('"compressor":null', '"compressor":{"id":"zlib","level":1}'),
        ('"order":"C"', '"order":"F"'),
        ('"dtype":"<f4"', '"dtype":"<i4"'),
        ('"dimension_separator":"."', '"dimension_separator":"/"'),
        ('"shape"', '"no shape"'),
        ("{", ""),
    ],
)
def test_other_layouts_are_left_to_tensorstore(change: tuple[str, str], tmp_path: Path) -> None:
    write_array(tmp_path / "params", values((20, 9), torch.float32), (7, 9))
    file = tmp_path / "params" / "w" / ".zarray"
    content = file.read_text()
    assert change[0] in content and plain_array(tmp_path / "params", "w") is not None
    file.write_text(content.replace(*change, 1))
    assert plain_array(tmp_path / "params", "w") is None
    assert plain_array(tmp_path / "params", "v") is None


def test_a_step_of_a_mesh_becomes_whole_tensors(shared_run: Run, tmp_path: Path) -> None:
    """Every matrix split 4 x 2 as devices would write it, the vocabulary of 131 in parts of 33."""
    run = shared_run.copy(tmp_path / "run")
    facts = {**read_run(run.step(20)), "step": 30}
    handler, writer = array_item_handler()
    items = ocp.CompositeCheckpointHandler(params=handler, run=ocp.JsonCheckpointHandler())
    arrays = {name: split_array(tensor) for name, tensor in run.weights[20].items()}
    with ocp.Checkpointer(items) as orbax:
        args = ocp.args.Composite(params=ocp.args.PyTreeSave(arrays), run=ocp.args.JsonSave(facts))
        orbax.save(run.step(30), args=args)
    publish(run.step(30), 30, {}, {"params": writer})
    assert len(list((run.step(30) / "params" / "lm_head.weight").glob("*.*"))) > 8
    assert run_tool(run.folder, tmp_path / "out", "--dtype", "float32", "--verify") == 0
    assert_same_bits(tensors_in(tmp_path / "out"), run.weights[20])


def split_array(tensor: torch.Tensor) -> HostArray:
    """A tensor as a HostArray in 4 parts along its first dim and 2 along its second."""
    chunks = tuple(-(-n // parts) for n, parts in zip(tensor.shape, (4, 2), strict=False))

    def pieces() -> Pieces:
        for corner in itertools.product(*(range(0, n, c) for n, c in zip(tensor.shape, chunks, strict=True))):
            ends = (min(a + c, n) for a, c, n in zip(corner, chunks, tensor.shape, strict=True))
            where = tuple(slice(a, b) for a, b in zip(corner, ends, strict=True))
            yield where, tensor[where].numpy()

    return HostArray(tuple(tensor.shape), np.dtype(np.float32), chunks, pieces)
