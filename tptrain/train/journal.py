"""The journal: one JSON line per step, for programs. Written one step late, when the numbers are there."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

JOURNAL_FILE = "journal.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """What happened in one step.

    step:            counted from 1.
    loss:            mean over the counted tokens, before the update.
    counted_tokens:  targets in the loss.
    real_tokens, padded_tokens: inputs that are, or are not, of a record.
    grad_norm:       global norm before clipping.
    learning_rate:   the rate this step used.
    step_seconds:    from the end of the step before to the end of this one, without compiling and saving.
    trace_seconds, compile_seconds: host time spent on them (the first step of a process only; later ones
                     replay what it compiled).
    input_seconds:   host time spent waiting for the batch.
    compiles:        programs this process had compiled by the end of the step.
    cursor:          global index of the sample after this step's last.
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

    @property
    def tokens_per_second(self) -> float:
        """Tokens of records, without padding."""
        return self.real_tokens / max(self.step_seconds, 1e-9)


class Journal:
    """`RUN/journal.jsonl`, appended to and flushed line by line."""

    def __init__(self, run_folder: Path, keep_steps: int):
        """keep_steps: lines after this step are cut; they belong to steps that will be done again."""
        path = run_folder / JOURNAL_FILE
        kept = [r for r in read_journal(path) if r.step <= keep_steps] if path.exists() else []
        # Written beside and renamed, so that a crash here leaves the old journal.
        fresh = path.with_suffix(".new")
        fresh.write_text("".join(_line(record) for record in kept), encoding="utf-8")
        os.replace(fresh, path)
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, record: StepRecord) -> None:
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(record: StepRecord) -> str:
    return json.dumps(asdict(record)) + "\n"


def read_journal(path: Path) -> list[StepRecord]:
    """All records of a journal. A last line cut short by a crash is left out."""
    records = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for line in lines[:-1]:
        records.append(StepRecord(**json.loads(line)))
    return records
