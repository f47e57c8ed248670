"""Rows as a stream of cast pieces: the bits of a plain cast, nothing lost to a dtype, a bounded lead."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from tests.weights.small_llama import same_bits
from tptrain.errors import ProblemsError
from tptrain.family.table import ParamRow, matrix, norm_scale
from tptrain.weights import blocks_of
from tptrain.weights.row_stream import PIECES_AHEAD, cast_pieces

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SETTING = "--dtype"


def cast(tensor: torch.Tensor, dtype: torch.dtype, blocks: int = 1) -> torch.Tensor:
    """A tensor through the stream, in so many blocks, put together again."""
    row = matrix("w", ("vocab", "embed")[: tensor.ndim], tuple(tensor.shape))
    parts = tensor.tensor_split(blocks) if tensor.ndim else (tensor,)
    with closing(cast_pieces([row], lambda _: iter(parts), dtype, SETTING)) as pieces:
        return torch.cat([piece.clone() for _, piece in pieces]).reshape(tensor.shape)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES[1:])
@pytest.mark.parametrize(("size", "blocks"), [((), 1), ((7,), 1), ((0, 5), 1), ((1111, 2003), 3)])
def test_pieces_are_the_bits_of_a_plain_cast(
    source: torch.dtype, target: torch.dtype, size: tuple[int, ...], blocks: int
) -> None:
    tensor = torch.randn(size, dtype=torch.float64).to(source)
    assert same_bits(cast(tensor, target, blocks), tensor.to(target))


@pytest.mark.parametrize("where", [0, 1, 70_000, 2_000_000])
@pytest.mark.parametrize(
    ("source", "target", "value", "shown"),
    [
        (torch.float32, torch.float16, 1e5, "100000, the largest float16 is 65504"),
        (torch.float32, torch.float16, -65505.0, "65505, the largest float16 is 65504"),
        (torch.float32, torch.bfloat16, -3.4e38, "3.4e+38, the largest bfloat16 is 3.38953e+38"),
        (torch.float64, torch.float32, 1e39, "1e+39, the largest float32 is 3.40282e+38"),
        (torch.bfloat16, torch.float16, 70144.0, "70144, the largest float16 is 65504"),
    ],
)
@pytest.mark.parametrize("company", [0.0, float("inf"), float("nan")])
def test_a_value_that_does_not_fit_is_refused_wherever_it_is(
    source: torch.dtype, target: torch.dtype, value: float, shown: str, where: int, company: float
) -> None:
    tensor = torch.zeros(2_000_001, dtype=source)
    tensor[where], tensor[min(where + 1, 1_999_999)] = value, company
    with pytest.raises(ProblemsError) as caught:
        cast(tensor, target)
    problem = caught.value.problems[0]
    assert (problem.setting, f"torch.{problem.value}") == (SETTING, str(target))
    assert problem.other == f"w has {shown}"


@pytest.mark.parametrize("value", [65504.0, -65504.0, float("inf"), -float("inf"), float("nan")])
def test_the_largest_number_infinity_and_nan_are_values_like_others(value: float) -> None:
    tensor = torch.tensor([1.0, value])
    assert torch.equal(cast(tensor, torch.float16).nan_to_num(7.0), tensor.half().nan_to_num(7.0))


def wait_until_idle(made: list[int]) -> None:
    """Until nothing has been added for a while; a thread that may go on does so within microseconds."""
    before = -1
    while len(made) > before:
        before = len(made)
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("block_rows", "most"),
    [
        # Many pieces to a block: the one that is being cast.
        (4000, 1),
        # A block is one piece: the piece in hand and those that wait for it.
        (2, 1 + PIECES_AHEAD),
    ],
)
def test_reading_is_no_further_ahead_than_it_may_be(block_rows: int, most: int) -> None:
    made: list[int] = []

    def blocks(row: ParamRow) -> Iterator[torch.Tensor]:
        for number in range(10):
            made.append(number)
            yield torch.ones(block_rows, 1000)

    row = matrix("w", ("vocab", "embed"), (10 * block_rows, 1000))
    with closing(cast_pieces([row], blocks, torch.bfloat16, SETTING)) as pieces:
        next(pieces)
        wait_until_idle(made)
        assert len(made) == most
        for _ in pieces:
            pass
    assert made == list(range(10))


def test_a_piece_keeps_its_values_until_the_next_is_asked_for() -> None:
    row = matrix("w", ("vocab", "embed"), (9, 2**20))
    blocks = (torch.full((1, 2**20), float(number)) for number in range(9))
    with closing(cast_pieces([row], lambda _: blocks, torch.bfloat16, SETTING)) as pieces:
        for number, (_, piece) in enumerate(pieces):
            time.sleep(0.01)  # the thread runs as far ahead as it may
            assert (piece == number).all()


def test_rows_come_in_their_order() -> None:
    rows = [norm_scale(f"n{number}", 3 + number) for number in range(5)]
    with closing(cast_pieces(rows, blocks_of(lambda row: torch.ones(row.size)), torch.float32, "")) as pieces:
        assert [(row.name, len(piece)) for row, piece in pieces] == [(f"n{i}", 3 + i) for i in range(5)]
