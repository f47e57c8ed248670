"""The result of a search for people (a table and the overrides to paste) and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tptrain.estimate.candidates import SEARCHED, Candidate, Refusal
from tptrain.estimate.text import bytes_text, seconds_text
from tptrain.program.compiled import CompiledProgram

SHOWN_ROWS = 20
_HEADS = ("data", "fsdp", "tensor", "remat", "rows", "accumulation")


@dataclass(frozen=True)
class SearchRow:
    """A candidate and what became of it.

    program: its compile, None where it was not compiled. failure: why its step could not be traced, "" where
    it could or was not tried.
    """

    candidate: Candidate
    program: CompiledProgram | None = None
    failure: str = ""

    @property
    def basis(self) -> str:
        """Where the time is from."""
        if self.program and self.program.cost:
            return "compiled"
        return "roofline" if self.candidate.bound_seconds is not None else "unknown"

    @property
    def seconds(self) -> float | None:
        """Seconds of a step."""
        if self.program and self.program.cost:
            return self.program.cost.score_seconds
        return self.candidate.bound_seconds

    @property
    def tokens_per_second_per_chip(self) -> float | None:
        if not self.seconds:
            return None
        return self.candidate.step_tokens / self.seconds / self.candidate.plan.num_devices

    @property
    def hbm_bytes(self) -> int:
        """Of a chip: what the compiler says where it does, else the estimate."""
        if self.program and self.program.memory:
            return self.program.memory.peak_bytes
        if self.program and self.program.shortage:
            return self.program.shortage.needed_bytes
        return self.candidate.found.memory.total_bytes

    @property
    def verdict(self) -> str:
        """Whether it fits: by the compiler where that was asked, else by the estimate."""
        if self.failure:
            return "not traced"
        if self.program is None:
            return self.candidate.found.verdict
        words = {"compiled": "fits, compiled", "out_of_memory": "does not fit, compiled"}
        return words.get(self.program.outcome, self.program.outcome.replace("_", " "))

    @property
    def can_run(self) -> bool:
        """Nothing that is known keeps it from running."""
        outcome = self.program.outcome if self.program else "compiled"
        return not self.failure and outcome == "compiled" and self.candidate.is_worth_compiling

    @property
    def order(self) -> tuple[bool, bool, float, int]:
        """What can run before what cannot, what is compiled before what is estimated, then by speed."""
        speed = self.tokens_per_second_per_chip or 0.0
        return not self.can_run, self.program is None, -speed, self.hbm_bytes


@dataclass(frozen=True)
class SearchPage:
    """All that a search knows when it ends.

    rows:     the candidates that fit by the estimate, best first. too_large: how many do not.
    given:    the overrides of the command line that stay beside those of a row.
    price:    of a chip-hour in USD; None: no cost is shown.
    finished: False when it was interrupted.
    """

    rows: tuple[SearchRow, ...]
    too_large: int
    refusals: tuple[Refusal, ...]
    given: tuple[str, ...]
    price: float | None
    finished: bool

    @property
    def refused(self) -> int:
        return sum(refusal.count for refusal in self.refusals)

    @property
    def best(self) -> SearchRow | None:
        return next((row for row in self.rows if row.can_run), None)


def cost_per_billion_tokens(price: float, tokens_per_second_per_chip: float) -> float:
    """USD for 1e9 tokens. price: USD of a chip-hour.

    >>> cost_per_billion_tokens(3.6, 1000.0)
    1000.0
    """
    return price / 3600 * 1e9 / tokens_per_second_per_chip


def overrides(page: SearchPage, row: SearchRow) -> list[str]:
    """What makes the recipe that of a row, the overrides that were given included."""
    changes = row.candidate.changes
    return [*page.given, *(f"{path}={changes[path]}" for path in SEARCHED)]


def search_lines(page: SearchPage) -> list[str]:
    """The page as lines of plain text."""
    return [*_count_lines(page), *_table_lines(page), *_failure_lines(page), *_end_lines(page)]


def _count_lines(page: SearchPage) -> list[str]:
    total = len(page.rows) + page.too_large + page.refused
    lines = [
        f"Search: {total} layouts looked at; {page.refused} refused, {page.too_large} larger than a chip's"
        f" or a host's memory by the estimate, {len(page.rows)} left."
    ]
    for refusal in page.refusals:
        lines.append(f"  Refused, {refusal.count}: {refusal.problem.setting} {refusal.problem.rule}.")
    return lines


def _table_lines(page: SearchPage) -> list[str]:
    if not page.rows:
        return []
    shown = _shown(page)
    body = [_cells(number, row, page.price) for number, row in shown]
    cost = ["USD / 1e9 tokens"] if page.price is not None else []
    head = ["", *_HEADS, "HBM of a chip", "verdict", "step", "tokens/s/chip", *cost, "time from"]
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    padded = ("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in (head, *body))
    more = len(page.rows) - len(shown)
    return ["", *padded, *([f"  and {more} more, which --json lists."] if more > 0 else [])]


def _shown(page: SearchPage) -> list[tuple[int, SearchRow]]:
    """The best rows by their number, and every other one that was tried."""
    numbered = enumerate(page.rows, start=1)
    return [(n, row) for n, row in numbered if n <= SHOWN_ROWS or row.program or row.failure]


def _cells(number: int, row: SearchRow, price: float | None) -> list[str]:
    speed = row.tokens_per_second_per_chip
    cells = [str(number), *(row.candidate.changes[path] for path in SEARCHED)]
    cells += [bytes_text(row.hbm_bytes), row.verdict]
    cells.append("unknown" if row.seconds is None else seconds_text(row.seconds))
    cells.append("unknown" if speed is None else f"{speed:,.0f}")
    if price is not None:
        cells.append("unknown" if speed is None else f"{cost_per_billion_tokens(price, speed):,.2f}")
    return [*cells, row.basis]


def _failure_lines(page: SearchPage) -> list[str]:
    lines = []
    for number, row in _shown(page):
        message = row.failure or (row.program.message if row.program else "")
        if message:
            lines.append(f"  Row {number}: {message}")
    return lines


def _end_lines(page: SearchPage) -> list[str]:
    lines = [""]
    bases = {row.basis for row in page.rows}
    if "compiled" in bases:
        lines.append(
            "compiled: estimated from the compiled program, for ranking; these stand before all that was"
            " not compiled."
        )
    if "roofline" in bases:
        lines.append("roofline: a bound at peak numbers with nothing overlapped; real steps are slower.")
    if "unknown" in bases:
        lines.append("unknown: this kind of device has no published numbers; ordered by memory.")
    if len({row.candidate.changes["data.batch_rows"] for row in page.rows}) > 1:
        lines.append("rows: another number than the recipe's changes what is trained.")
    if page.best is not None:
        lines += ["Overrides of the best:", f"  {' '.join(overrides(page, page.best))}"]
    if not page.finished:
        lines.append("Interrupted: the same command goes on, and reads what is compiled from the cache.")
    return lines


def search_json(page: SearchPage) -> dict[str, Any]:
    """The page as JSON data: every row, best first."""
    return {
        "finished": page.finished,
        "refused": [{"count": r.count, "first": str(r.problem)} for r in page.refusals],
        "too_large": page.too_large,
        "rows": [_row_json(page, row) for row in page.rows],
    }


def _row_json(page: SearchPage, row: SearchRow) -> dict[str, Any]:
    speed = row.tokens_per_second_per_chip
    cost = cost_per_billion_tokens(page.price, speed) if page.price and speed else None
    return {
        "overrides": overrides(page, row),
        "can_run": row.can_run,
        "verdict": row.verdict,
        "basis": row.basis,
        "step_seconds": row.seconds,
        "step_tokens": row.candidate.step_tokens,
        "tokens_per_second_per_chip": speed,
        "usd_per_billion_tokens": cost,
        "hbm_bytes": row.hbm_bytes,
        "estimated_hbm_bytes": row.candidate.found.memory.total_bytes,
        "cached": row.program.cached if row.program else None,
        "message": row.failure or (row.program.message if row.program else ""),
    }


def ordered(rows: Sequence[SearchRow]) -> tuple[SearchRow, ...]:
    """Rows with the best first."""
    return tuple(sorted(rows, key=lambda row: row.order))
