"""The journal: one JSON object per line, for programs. A line per step, and one per begin and end of a phase.

A step's line is written one step late where the devices work beside the host, when its numbers are there.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

JOURNAL_FILE = "journal.jsonl"

# What a run spends time on beside its steps:
#   start    from the call until the state is on the devices; restore lies in it
#   restore  reading a checkpoint
#   compile  tracing and compiling the step, in the first step of a process
#   save     the copy of the state to the host, for which training stops
#   write    writing that copy to the disk, while training goes on
#   commit   digest manifest and publishing
#   eval     scoring held-out records; its end has the scores
#   export   writing the model folder
#   preempt  from SIGTERM to the end of the process
#   stop     not a phase but an end: the run stops before its last step; `reason` says why
PHASES = ("start", "restore", "compile", "save", "write", "commit", "eval", "export", "preempt", "stop")

# A full disk must not end a training that has room again before its next checkpoint.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class StepRecord:
    """What happened in one step.

    step:            counted from 1.
    loss:            mean over the counted tokens, before the update; with the router's loss times its
                     coefficient where a mixture of experts is trained with it, as transformers reports it.
    counted_tokens:  targets in the loss.
    real_tokens, padded_tokens: inputs that are, or are not, of a record.
    grad_norm:       global norm before clipping.
    learning_rate:   the rate this step used.
    step_seconds:    from the end of the step before to the end of this one, without compiling and saving.
    trace_seconds, compile_seconds: host time spent on them (the first step of a process only; later ones
                     replay what it compiled).
    input_seconds:   host time spent waiting for the batch.
    compiles:        programs this process had compiled by the end of the step.
    cursor:          samples used by the end of the step: the global index of the next one.
    rows_digest:     `Batch.rows_digest`: equal for two steps that trained on the same samples.
    skipped:         why the update was left out: "non_finite" or "spike"; "" where it was not.
    source_tokens:   real tokens by source; {} where there is only one.

    In the file, a loss or norm that is not finite is null; read back it is NaN.
    """

    step: int
    loss: float
    counted_tokens: int
    real_tokens: int
    padded_tokens: int
    grad_norm: float
    learning_rate: float
    step_seconds: float
    trace_seconds: float
    compile_seconds: float
    input_seconds: float
    compiles: int
    cursor: int
    rows_digest: str = ""
    skipped: str = ""
    source_tokens: Mapping[str, int] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of records, without padding."""
        return self.real_tokens / max(self.step_seconds, 1e-9)


@dataclass(frozen=True)
class Event:
    """The begin or the end of a phase.

    event:   "begin" or "end".
    phase:   one of PHASES. Phases overlap: a step is written while others are trained.
    step:    the step that it belongs to; for start and restore, the step gone on from (0 before it is known).
    time:    seconds since the epoch (Unix time).
    metrics: scores, by name; only at the end of an eval.
    reason:  of a stop: "patience" (the scores got no better) or a guard's: "non_finite", "spike",
             "too_many_skipped"; "" elsewhere.
    """

    event: str
    phase: str
    step: int
    time: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


class Journal:
    """`RUN/journal.jsonl`, appended to line by line by the run and its threads; every line is flushed.

    Lines that the disk has no room for are held and written before the next one.
    """

    def __init__(self, run_folder: Path, keep_steps: int | None = None, held: bool = False):
        """keep_steps: `cut` to this step at once. held: leave the file alone until `open`."""
        self.path = run_folder / JOURNAL_FILE
        self._lock = threading.RLock()
        self._held: list[bytes] = []
        self._file: BinaryIO | None = None
        if not held:
            self.open()
        if keep_steps is not None:
            self.cut(keep_steps)

    def open(self) -> None:
        """Append from now on, beginning with what was held. The run's folder exists."""
        with self._lock:
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)
                # A line that a kill has cut short would run into the next one.
                self._file.truncate(_whole_lines(self.path))
            self._write_held()

    def open_if_there(self) -> None:
        """`open`, but begin no journal in a folder that has none."""
        if self.path.exists():
            self.open()

    def __call__(self, record: StepRecord) -> None:
        self._write(asdict(record))

    def event(self, event: str, phase: str, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Write that a phase begins or ends now. Safe to call from any thread."""
        assert phase in PHASES, phase
        line = {"event": event, "phase": phase, "step": step, "time": time.time()}
        self._write({**line, "metrics": dict(metrics)} if metrics else line)

    def stop(self, step: int, reason: str) -> None:
        """Write that the run stops at this step, before its last one."""
        self._write({"event": "end", "phase": "stop", "step": step, "time": time.time(), "reason": reason})

    @contextmanager
    def phase(self, phase: str, step: int) -> Iterator[None]:
        """The block is this phase, also when it raises."""
        self.event("begin", phase, step)
        try:
            yield
        finally:
            self.event("end", phase, step)

    def cut(self, step: int) -> None:
        """Drop all lines of steps after this one; they belong to steps that will be done again."""
        with self._lock:
            assert self._file is not None, "open it first"
            kept = [line for line in _lines(self.path) if line["step"] <= step]
            # Written beside and renamed, so that a crash here leaves the old journal.
            fresh = self.path.with_suffix(".new")
            fresh.write_bytes(b"".join(map(_encoded, kept)))
            os.replace(fresh, self.path)
            self._file.close()
            self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _write(self, line: dict[str, Any]) -> None:
        with self._lock:
            self._held.append(_encoded(line))
            self._write_held()

    def _write_held(self) -> None:
        while self._held and self._file is not None:
            if not _append(self._file, self._held[0]):
                return
            del self._held[0]


def _append(file: BinaryIO, line: bytes) -> bool:
    """Write a line whole or not at all; whether there was room for it."""
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(line) == len(line):
            return True
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
    file.truncate(end)
    return False


def _encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(_finite(line), allow_nan=False).encode() + b"\n"


def _finite(value: Any) -> Any:
    """The value with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse, as far as there is one: NaN for None."""
    return {name: math.nan if value is None else value for name, value in values.items()}


def _whole_lines(path: Path) -> int:
    """Length of a file up to the end of its last whole line."""
    return path.read_bytes().rfind(b"\n") + 1


def _lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a journal. A last line cut short by a crash is left out."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def read_journal(path: Path) -> list[StepRecord]:
    """The steps of a journal. A last line cut short by a crash is left out."""
    return [StepRecord(**_numbers(line)) for line in _lines(path) if "event" not in line]


def source_tokens(records: Iterable[StepRecord]) -> dict[str, int]:
    """Real tokens of several steps by source, in the order of the names."""
    total: Counter[str] = Counter()
    for record in records:
        total.update(record.source_tokens)
    return dict(sorted(total.items()))


def read_events(path: Path) -> list[Event]:
    """The begins and ends of phases in a journal, in the order they were written."""
    events = (line for line in _lines(path) if "event" in line)
    return [Event(**{**line, "metrics": _numbers(line.get("metrics", {}))}) for line in events]
