"""What a run says at its start and at its end."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tptrain.config.plan import Plan
from tptrain.data.batches import RunLength
from tptrain.eval.exact_match import Score
from tptrain.report.plan_page import run_sentences
from tptrain.train.loop import Progress

_SHOWN_ANSWERS = 3


def print_start(console: Console, plan: Plan, length: RunLength, start: Progress) -> None:
    """The plan in sentences, with what only the records could tell."""
    for sentence in run_sentences(plan):
        console.print(sentence, soft_wrap=True)
    rows = plan.recipe.data.batch_rows
    samples = f"{length.total_steps * rows:,} rows"
    if length.total_samples is not None:
        empty = length.total_steps * rows - length.total_samples
        samples = f"{length.total_samples:,} records, the last step filled up with {empty} empty rows"
    console.print(f"Length: {length.total_steps:,} steps, {samples}.")
    if start.step:
        console.print(f"Going on after step {start.step} with sample {start.cursor:,}.")
    for notice in plan.notices:
        console.print(f"Note: {notice}", soft_wrap=True)


def print_summary(
    console: Console,
    plan: Plan,
    output_dir: Path,
    checkpoint: Path,
    exported: Path | None,
    before: Score | None,
    after: Score | None,
) -> None:
    """Scores with sample answers, the folders, and the next command to type."""
    if before is not None and after is not None:
        console.print(_score_table(before, after))
        _print_answers(console, before, after)
    console.print(f"Checkpoint: {checkpoint}", soft_wrap=True)
    if exported is not None:
        console.print(f"Exported:   {exported}  (a Hugging Face model folder)", soft_wrap=True)
    question = after.answers[0].question if after is not None else "your question"
    console.print(f"Next:       tptrain generate {output_dir} {shlex.quote(question)}", soft_wrap=True)


def _score_table(before: Score, after: Score) -> Table:
    table = Table(title="Exact match on held-out problems")
    for column in ("", "right", "of", "rate"):
        table.add_column(column, justify="left" if not column else "right")
    for name, score in (("before training", before), ("after training", after)):
        table.add_row(name, str(score.right), str(len(score.answers)), f"{score.rate:.0%}")
    return table


def _print_answers(console: Console, before: Score, after: Score) -> None:
    for old, new in list(zip(before.answers, after.answers, strict=True))[:_SHOWN_ANSWERS]:
        console.print(f"\n{new.prompt}", markup=False, soft_wrap=True)
        console.print(f"  before: {_one_line(old.generated)}", markup=False, soft_wrap=True)
        mark = "right" if new.is_right else "wrong"
        console.print(f"  after:  {_one_line(new.generated)}  [{mark}]", markup=False, soft_wrap=True)
        console.print(f"  true:   {_one_line(new.reference)}", markup=False, soft_wrap=True)
    console.print()


def _one_line(text: str, longest: int = 120) -> str:
    flat = " / ".join(text.split("\n"))
    return flat if len(flat) <= longest else f"{flat[:longest]} ..."
