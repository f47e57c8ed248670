"""A disk that is full, and how far a conversion is: neither leaves half a result or a traceback."""

from __future__ import annotations

import io
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tests.convert.models import Run, names_in, run_tool, write_model
from tptrain.convert import progress
from tptrain.convert.progress import ByteProgress, size_text
from tptrain.weights import staging


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 20 kB, as on a disk that fills up amid a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_of_a_checkpoint(
    tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_model(tmp_path / "source")
    request.getfixturevalue("small_files")
    assert run_tool(source, tmp_path / "out") == 2
    assert f"OUT={tmp_path / 'out'}: must be writable to the end (" in capsys.readouterr().err
    assert names_in(tmp_path) == ["source"]


def test_a_full_disk_leaves_nothing_of_a_folder(
    shared_run: Run, tmp_path: Path, small_files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(shared_run.folder, tmp_path / "out") == 2
    assert f"OUT={tmp_path / 'out'}: must be writable to the end (" in capsys.readouterr().err
    assert names_in(tmp_path) == []


def test_too_little_room_is_told_before_anything_is_written(
    shared_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_model(tmp_path / "source")
    usage = staging.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    for given in (source, shared_run.folder):
        assert run_tool(given, tmp_path / "out") == 2
        assert "must lie on a disk with " in capsys.readouterr().err
    assert names_in(tmp_path) == ["source"]


def told(terminal: bool, monkeypatch: pytest.MonkeyPatch, seconds: float) -> str:
    """What is shown of 3 x 1 MB, `seconds` apart."""
    stream, now = io.StringIO(), [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = Console(file=stream, force_terminal=terminal, width=100, highlight=False, markup=False)
    with ByteProgress("writing", 4_000_000, console) as bar:
        for _ in range(3):
            now[0] += seconds
            bar(1_000_000)
    return stream.getvalue()


class TestProgress:
    def test_a_line_at_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert told(False, monkeypatch, 2.0) == "writing: 3.00 MB of 4.00 MB, 500.00 kB/s\n"

    def test_lines_when_it_takes_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lines = told(False, monkeypatch, 40.0).splitlines()
        assert [line.split(" of ")[0] for line in lines] == [
            *("writing: 1.00 MB", "writing: 2.00 MB"),
            *("writing: 3.00 MB", "writing: 3.00 MB"),
        ]

    def test_a_bar_on_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shown = told(True, monkeypatch, 2.0)
        assert "writing" in shown and "3.0/4.0 MB" in shown and "\x1b[" in shown

    def test_no_line_after_an_error(self) -> None:
        stream = io.StringIO()
        with pytest.raises(ZeroDivisionError), ByteProgress("writing", 10, Console(file=stream)):
            raise ZeroDivisionError
        assert stream.getvalue() == ""

    @pytest.mark.parametrize(
        ("num_bytes", "text"),
        [
            (0, "0 bytes"),
            (999, "999 bytes"),
            (1_000, "1.00 kB"),
            (64_500_000, "64.50 MB"),
            (8.1e12, "8,100.00 GB"),
        ],
    )
    def test_sizes(self, num_bytes: float, text: str) -> None:
        assert size_text(num_bytes) == text
