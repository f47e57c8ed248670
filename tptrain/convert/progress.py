"""How far a conversion is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_LINE_SECONDS = 30.0


class ByteProgress:
    """Told the bytes that are done. On a terminal it shows a bar with bytes per second and the time left.

    Elsewhere it prints a line every half a minute, and one at the end. Use it as a context manager.
    """

    def __init__(self, what: str, total_bytes: int, console: Console | None = None):
        """what: the work, such as "writing". console: None for stderr, so that results alone go to stdout."""
        self._console = console or Console(stderr=True, highlight=False, markup=False)
        self._what, self._total, self._done = what, total_bytes, 0
        self._began = self._said = time.monotonic()
        self._bar = self._make_bar() if self._console.is_terminal else None
        self._task = self._bar.add_task("", total=total_bytes) if self._bar else None

    def _make_bar(self) -> Progress:
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        return Progress(TextColumn(self._what), *columns, console=self._console)

    def __enter__(self) -> ByteProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __call__(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, num_bytes)
        elif time.monotonic() - self._said >= _LINE_SECONDS:
            self._say()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif error is None:
            self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        rate = self._done / max(self._said - self._began, 1e-9)
        shown = f"{size_text(self._done)} of {size_text(self._total)}, {size_text(rate)}/s"
        self._console.print(f"{self._what}: {shown}", soft_wrap=True)


def size_text(num_bytes: float) -> str:
    """A number of bytes for people, in units of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes:.0f} bytes"
