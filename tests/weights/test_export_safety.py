"""An export is complete or absent, whatever fails while it is written."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from tests.weights.exporting import block_reader, export, reader
from tests.weights.small_llama import read_config, saved_model, saved_table
from tptrain.errors import ProblemsError
from tptrain.family import ParamRow
from tptrain.weights import export_folder


class Interrupt(BaseException):
    """Stands for KeyboardInterrupt, which pytest takes for itself."""


@pytest.mark.parametrize("error", [RuntimeError("boom"), OSError("boom"), Interrupt("boom")])
def test_a_failure_half_way_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    saved_model(tmp_path / "in")
    read, calls = reader(tmp_path / "in"), iter(range(100))

    def failing(row: ParamRow) -> torch.Tensor:
        if next(calls) == 2:
            raise error
        return read(row)

    with pytest.raises(type(error), match="boom"):
        export(tmp_path / "in", tmp_path / "out", failing, max_shard_bytes=100)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), OSError("boom")])
def test_a_failure_between_two_blocks_of_a_row_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    saved_model(tmp_path / "in")
    table, whole = saved_table(tmp_path / "in"), block_reader(tmp_path / "in")

    def failing(row: ParamRow) -> Iterator[torch.Tensor]:
        yield from whole(row)
        if row is table[3]:
            raise error

    with pytest.raises(type(error), match="boom"):
        export_folder(tmp_path / "out", table, read_config(tmp_path / "in"), failing)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def stop(num_bytes: int) -> None:
    raise Interrupt(f"after {num_bytes} bytes")


def test_when_writing_stops_so_do_the_threads_that_read_and_cast(tmp_path: Path) -> None:
    saved_model(tmp_path / "in")
    read, rows, threads = reader(tmp_path / "in"), [], threading.active_count()

    def counting(row: ParamRow) -> torch.Tensor:
        rows.append(row.name)
        return read(row)

    with pytest.raises(Interrupt, match="after"):
        export(tmp_path / "in", tmp_path / "out", counting, progress=stop)
    assert threading.active_count() == threads
    assert len(rows) <= 6 < len(saved_table(tmp_path / "in"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor[:-1], "elements were read, not"),
        (lambda tensor: torch.cat([tensor, tensor[:1]]), "elements were read, not"),
        (lambda tensor: tensor.T if tensor.ndim > 1 else tensor, "a block of"),
    ],
    ids=["short", "long", "transposed"],
)
def test_rows_of_the_wrong_size_are_never_published(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    saved_model(tmp_path / "in")
    read = reader(tmp_path / "in")
    with pytest.raises(AssertionError, match=message):
        export(tmp_path / "in", tmp_path / "out", lambda row: change(read(row)))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limits how large a file this process may write, as a full disk would.

    No longer than needed: the limit is also that of the file pytest may be printing to.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_is_a_problem_and_leaves_nothing(tmp_path: Path) -> None:
    saved_model(tmp_path / "in")
    arguments = (saved_table(tmp_path / "in"), read_config(tmp_path / "in"), block_reader(tmp_path / "in"))
    with pytest.raises(ProblemsError) as caught, largest_file(20_000):
        export_folder(tmp_path / "out", *arguments)
    problem = caught.value.problems[0]
    assert (problem.setting, problem.value) == ("export.path", tmp_path / "out")
    assert problem.rule == "must be writable to the end" and "File too large" in problem.other
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def flip_last_bit(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


READ_BACK = "must read back as it was written"


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (flip_last_bit, rf"{READ_BACK} \(different: model.embed_tokens.weight in model-00001-of-00030"),
        (write(b""), "must be writable to the end"),
        (write(save({"other": torch.ones(2)}, {"format": "pt"})), READ_BACK),
        (write(save({"model.embed_tokens.weight": torch.ones(2)})), READ_BACK),
        (lambda path: (path.parent / "stray.safetensors").write_bytes(b""), rf"{READ_BACK}.*stray"),
        (lambda path: (path.parent / "config.json").write_bytes(b"{}"), rf"{READ_BACK}.*config.json"),
        (lambda path: path.unlink(), "must be writable to the end"),
    ],
    ids=["one bit", "empty", "another tensor", "another size", "another file", "config", "gone"],
)
def test_what_was_written_is_read_back_before_it_is_published(
    tmp_path: Path, spoil: Callable[[Path], object], rule: str
) -> None:
    """A faulty disk is imitated by changing the first file before the last is written."""
    saved_model(tmp_path / "in")
    read = reader(tmp_path / "in")

    def spoiling(row: ParamRow) -> torch.Tensor:
        if row.name == "lm_head.weight":
            spoil(min(tmp_path.glob("out.partial-*/*/*.safetensors")))
        return read(row)

    with pytest.raises(ProblemsError, match=rule):
        export(tmp_path / "in", tmp_path / "out", spoiling, max_shard_bytes=100)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_nothing_is_read_before_the_target_is_checked(tmp_path: Path) -> None:
    saved_model(tmp_path / "in")
    (tmp_path / "out").mkdir()

    def never(row: ParamRow) -> torch.Tensor:
        raise AssertionError(f"{row.name} was read")

    with pytest.raises(ProblemsError, match=r"must not exist yet"):
        export(tmp_path / "in", tmp_path / "out", never)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    saved_model(tmp_path / "in")
    read = reader(tmp_path / "in")

    def racing(row: ParamRow) -> torch.Tensor:
        (tmp_path / "out").mkdir(exist_ok=True)
        return read(row)

    with pytest.raises(ProblemsError, match=r"must not exist yet"):
        export(tmp_path / "in", tmp_path / "out", racing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert list((tmp_path / "out").iterdir()) == []
