"""SafetensorsWriter: the library reads what was written, and nothing else can be written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file

from tests.weights.small_llama import same_bits
from tptrain.weights.safetensors_out import FilePlan, SafetensorsWriter, differences

FILE = "model.safetensors"
SIZES = {"w.weight": (7, 3), "a.bias": (5,), "none": (0, 4), "scale": (), "z": (2, 3, 5)}


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: torch.randn(size, dtype=torch.float64).to(dtype) for name, size in SIZES.items()}


def write(folder: Path, blocks: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> dict[str, str]:
    with SafetensorsWriter(folder, FilePlan(FILE, dtype, SIZES)) as writer:
        for name, block in blocks:
            assert writer.write(name, block) == block.nbytes
        return writer.finish()


def in_blocks(given: dict[str, torch.Tensor], rows: int) -> list[tuple[str, torch.Tensor]]:
    parts = {name: tensor.split(rows) if tensor.ndim else (tensor,) for name, tensor in given.items()}
    return [(name, block) for name, blocks in parts.items() for block in blocks]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_the_library_reads_the_bits_that_were_written(tmp_path: Path, dtype: torch.dtype, rows: int) -> None:
    given = tensors(dtype)
    digests = write(tmp_path, in_blocks(given, rows), dtype)
    read = load_file(tmp_path / FILE)
    assert read.keys() == given.keys()
    assert all(same_bits(read[name], tensor) for name, tensor in given.items())
    with safe_open(tmp_path / FILE, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    bits = {name: tensor.reshape(-1).view(torch.uint8).numpy() for name, tensor in given.items()}
    assert digests == {name: xxhash.xxh3_128_hexdigest(data.tobytes()) for name, data in bits.items()}
    assert differences(tmp_path, FilePlan(FILE, dtype, SIZES), digests) == []


def test_tensors_may_be_written_in_any_order_and_in_turns(tmp_path: Path) -> None:
    given = tensors(torch.bfloat16)
    blocks = in_blocks(given, 1)
    # First the first row of each tensor, from the last tensor to the first, then the rest.
    first = {name: next(block for other, block in blocks if other == name) for name in given}
    rest = [(name, block) for name, block in blocks if block is not first[name]]
    in_turns = [*reversed(first.items()), *rest]
    digests = write(tmp_path, in_turns, torch.bfloat16)
    assert all(same_bits(read, given[name]) for name, read in load_file(tmp_path / FILE).items())
    assert differences(tmp_path, FilePlan(FILE, torch.bfloat16, SIZES), digests) == []


def test_the_header_is_in_the_order_given_and_the_data_aligned(tmp_path: Path) -> None:
    write(tmp_path, in_blocks(tensors(torch.bfloat16), 3), torch.bfloat16)
    data = (tmp_path / FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert list(header) == ["__metadata__", *SIZES]
    assert length % 8 == 0 and data[8 + length - 1 : 8 + length] in b"} "
    assert [header[name]["data_offsets"] for name in SIZES] == [
        [0, 42],
        [42, 52],
        [52, 52],
        [52, 54],
        [54, 114],
    ]
    assert len(data) == 8 + length + 114


def test_a_block_that_is_not_contiguous_is_written_in_its_own_order(tmp_path: Path) -> None:
    given = tensors(torch.float32)
    transposed = {name: t.T.contiguous().T if t.ndim == 2 else t for name, t in given.items()}
    strided = {name: torch.stack([t, t + 1], dim=-1)[..., 0] for name, t in transposed.items()}
    assert not strided["w.weight"].is_contiguous()
    write(tmp_path, strided.items(), torch.float32)
    assert all(same_bits(tensor, given[name]) for name, tensor in load_file(tmp_path / FILE).items())


def test_others_may_read_the_file_as_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path, tensors(torch.float32).items(), torch.float32)
    finally:
        os.umask(before)
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o640


def test_an_existing_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"here")
    with pytest.raises(FileExistsError):
        SafetensorsWriter(tmp_path, FilePlan(FILE, torch.float32, SIZES))
    assert (tmp_path / FILE).read_bytes() == b"here"


GIVEN = tensors(torch.float32)
BLOCKS = in_blocks(GIVEN, 2)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (BLOCKS[:-1], "z: \\d+ bytes were not written"),
        (BLOCKS[:3] + BLOCKS[4:], "w.weight: 12 bytes were not written"),
        ([*BLOCKS[:4], BLOCKS[0], *BLOCKS[4:]], "w.weight: 24 bytes too many"),
        ([*BLOCKS, BLOCKS[0]], "w.weight: 24 bytes too many"),
        ([*BLOCKS[:4], ("other", torch.ones(1))], "other is not in model.safetensors"),
        ([("w.weight", GIVEN["w.weight"].bfloat16())], "a block of torch.bfloat16, not torch.float32"),
    ],
    ids=["last missing", "short", "long", "again", "unknown", "dtype"],
)
def test_what_does_not_follow_the_plan_is_a_bug(
    tmp_path: Path, blocks: list[tuple[str, torch.Tensor]], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        write(tmp_path, blocks, torch.float32)


def test_every_difference_is_named(tmp_path: Path) -> None:
    digests = write(tmp_path, GIVEN.items(), torch.float32)
    other = FilePlan(
        FILE,
        torch.float32,
        {"w.weight": (3, 7), "more": (1,), **{n: SIZES[n] for n in ("none", "scale", "z")}},
    )
    found = differences(tmp_path, other, {**digests, "z": digests["scale"]})
    assert found == [f"{name} in {FILE}" for name in ("a.bias", "more", "w.weight", "z")]
    same_sizes = FilePlan(FILE, torch.float16, SIZES)
    assert differences(tmp_path, same_sizes, digests) == [f"{name} in {FILE}" for name in sorted(SIZES)]
