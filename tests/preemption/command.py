"""`tptrain train` in a process of its own, watched through its journal and stopped by signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tptrain.train.journal import JOURNAL_FILE, Event, read_events, read_journal

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "tiny_gsm8k.py"

# A process is at its end this long after a signal that it obeys at once: 1 s, and something for the system,
# which has to take back the memory of a process on a machine that does other work.
AT_ONCE_SECONDS = 1.5
_LONGEST_SECONDS = 180.0

Settings = Mapping[str, object]


@dataclass(frozen=True)
class Ended:
    """How a process has ended. seconds: from the (last) signal to the end."""

    code: int
    seconds: float
    output: str


class Command:
    """One run of the command. Its output goes to a file beside the run's folder."""

    def __init__(self, run: Path, settings: Settings, *options: str):
        self.run = run
        self._log = run.with_suffix(f".{time.monotonic_ns()}.log")
        given = [f"{name}={value}" for name, value in {**settings, "output_dir": run}.items()]
        command = [sys.executable, "-m", "tptrain", "train", str(RECIPE), *given, *options]
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        self._signalled = 0.0

    def events(self) -> list[Event]:
        path = self.run / JOURNAL_FILE
        return read_events(path) if path.exists() else []

    def steps(self) -> list[int]:
        path = self.run / JOURNAL_FILE
        return [record.step for record in read_journal(path)] if path.exists() else []

    def until(self, holds: Callable[[Command], bool]) -> Command:
        """Wait until something holds; fail with the output if the process ends or hangs before."""
        deadline = time.monotonic() + _LONGEST_SECONDS
        while not holds(self):
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.01)
        return self

    def terminate(self) -> Command:
        self._signalled = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        return self

    def end(self) -> Ended:
        """Wait for the end of the process."""
        code = self._process.wait(_LONGEST_SECONDS)
        seconds = time.monotonic() - self._signalled
        return Ended(code, seconds, self._log.read_text())

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def begun(phase: str, step: int, after: int = 0) -> Callable[[Command], bool]:
    """Whether a phase of a step has begun and not ended. after: events of earlier processes, passed over."""

    def holds(command: Command) -> bool:
        events = [e for e in command.events()[after:] if (e.phase, e.step) == (phase, step)]
        return bool(events) and events[-1].event == "begin"

    return holds


def times(run: Path, phase: str, step: int) -> tuple[float, float]:
    """When the last such phase of a step began and ended."""
    events = [e for e in read_events(run / JOURNAL_FILE) if (e.phase, e.step) == (phase, step)]
    begin, end = events[-2:]
    assert (begin.event, end.event) == ("begin", "end"), events
    return begin.time, end.time
