"""Rows as cast pieces: the bits of a plain cast, nothing lost to a dtype, failures that end all threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from tests.weights.small_llama import same_bits
from tptrain.errors import ProblemsError
from tptrain.family.table import ParamRow, matrix, norm_scale
from tptrain.weights.row_stream import ROW_THREADS, cast_row, for_each_row

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SETTING = "--dtype"


def cast(tensor: torch.Tensor, dtype: torch.dtype, blocks: int = 1) -> torch.Tensor:
    """A tensor through the stream, in so many blocks, put together again."""
    row = matrix("w", ("vocab", "embed")[: tensor.ndim], tuple(tensor.shape))
    parts = tensor.tensor_split(blocks) if tensor.ndim else (tensor,)
    pieces = cast_row(row, lambda _: iter(parts), dtype, SETTING)
    return torch.cat([piece.clone() for piece in pieces]).reshape(tensor.shape)


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


def test_a_row_is_read_no_further_than_it_is_used() -> None:
    made: list[int] = []

    def blocks(row: ParamRow) -> Iterator[torch.Tensor]:
        for number in range(10):
            made.append(number)
            yield torch.full((4000, 1000), float(number))

    row = matrix("w", ("vocab", "embed"), (40_000, 1000))
    values = set()
    for piece in cast_row(row, blocks, torch.bfloat16, SETTING):
        assert made[-1] == len(made) - 1 == piece[0]
        values |= set(piece.unique().tolist())
    assert values == set(range(10))


def test_each_row_is_used_in_order_by_one_thread_and_rows_side_by_side() -> None:
    rows = [norm_scale(f"n{number}", 5) for number in range(6)]
    together = threading.Barrier(ROW_THREADS, timeout=60)
    seen: dict[str, list[tuple[int, int]]] = {row.name: [] for row in rows}

    def use(row: ParamRow, piece: torch.Tensor) -> None:
        together.wait()  # broken unless as many rows as there are threads are in work
        seen[row.name].append((int(piece[0]), threading.get_ident()))

    for_each_row(rows, lambda row: (torch.full((1,), float(i)) for i in range(3)), use)
    for pieces in seen.values():
        assert [value for value, _ in pieces] == [0, 1, 2] and len({thread for _, thread in pieces}) == 1
    assert len({thread for pieces in seen.values() for _, thread in pieces}) == ROW_THREADS


def test_what_fails_in_one_row_ends_the_others() -> None:
    rows = [norm_scale(f"n{number}", 1) for number in range(50)]
    closed, begun = threading.Event(), []

    def pieces(row: ParamRow) -> Iterator[torch.Tensor]:
        begun.append(row.name)
        if row.name == "n1":
            raise ValueError("n1 is broken")
        try:
            while True:
                yield torch.ones(1)
        finally:
            closed.set()

    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match="n1 is broken"):
        for_each_row(rows, pieces, lambda row, piece: None)
    assert closed.is_set() and len(begun) < len(rows)
    assert torch.get_num_threads() == threads
