"""What a run says at its start and at its end."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tptrain.config.metrics import EXACT_MATCH, HELD_OUT_LOSS, TOKEN_ACCURACY
from tptrain.config.plan import Plan
from tptrain.estimate import estimate
from tptrain.eval.exact_match import Score
from tptrain.report.estimate_page import verdict_sentence
from tptrain.report.plan_page import run_sentences
from tptrain.train.guards import Guards
from tptrain.train.scoring import Scores
from tptrain.train.start import Start

_SHOWN_ANSWERS = 3
_METRIC_TEXTS = {
    EXACT_MATCH: "exact match",
    HELD_OUT_LOSS: "held-out loss",
    TOKEN_ACCURACY: "token accuracy",
}


def print_start(console: Console, plan: Plan, start: Start, watches_sigterm: bool) -> None:
    """The plan in sentences, with what only the records and the checkpoint could tell."""
    for sentence in run_sentences(plan):
        console.print(sentence, soft_wrap=True)
    console.print(f"Length: {_length(plan, start)}.")
    progress = start.progress
    if progress.step:
        console.print(f"Going on after step {progress.step} with sample {progress.cursor:,}.")
    for line in start.lines:
        console.print(f"Changed: {line}.", soft_wrap=True)
    notices = [*plan.notices, *memory_notices(plan)]
    if not watches_sigterm:
        notices.append(
            "only the main thread of a process can watch for SIGTERM; here it ends the run unsaved."
        )
    for notice in notices:
        console.print(f"Note: {notice}", soft_wrap=True)


def memory_notices(plan: Plan) -> list[str]:
    """Whether the step fits a chip, where chips have a limit. A run is not refused for an estimate."""
    is_tpu = plan.topology.chip.platform == "tpu"
    return [verdict_sentence(plan, estimate(plan))] if is_tpu else []


def _length(plan: Plan, start: Start) -> str:
    total, samples = start.length.total_steps, start.length.total_samples
    remaining = total - start.progress.step
    rows = remaining * plan.recipe.data.batch_rows
    steps = (
        f"{total:,} steps, {remaining:,} of them from here on" if start.progress.step else f"{total:,} steps"
    )
    if samples is None:
        return f"{steps}, {rows:,} rows"
    records = samples - start.progress.cursor
    return f"{steps}, {records:,} records, the last step filled up with {rows - records} empty rows"


def print_summary(
    console: Console,
    plan: Plan,
    output_dir: Path,
    checkpoint: Path,
    exported: Path | None,
    before: Scores | None,
    after: Scores | None,
    guards: Guards,
    source_tokens: Mapping[str, int],
) -> None:
    """Scores with sample answers, skipped steps, the tokens that each source gave, the folders, and the next
    command to type."""
    answers = after.exact if after is not None else None
    if after is not None:
        console.print(_score_table(before, after))
    if answers is not None:
        _print_answers(console, before.exact if before is not None else None, answers)
    if guards.skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(guards.skipped.items()))
        console.print(f"Skipped:    {guards.skipped.total()} steps ({reasons})")
    if source_tokens:
        console.print(f"Sources:    {_source_shares(source_tokens)}", soft_wrap=True)
    console.print(f"Checkpoint: {checkpoint}", soft_wrap=True)
    if exported is not None:
        what = "a PEFT adapter" if plan.exports_adapter else "a Hugging Face model folder"
        console.print(f"Exported:   {exported}  ({what})", soft_wrap=True)
    question = answers.answers[0].problem.question if answers is not None else "your question"
    console.print(f"Next:       tptrain generate {output_dir} {shlex.quote(question)}", soft_wrap=True)


def _source_shares(tokens: Mapping[str, int]) -> str:
    total = sum(tokens.values())
    return ", ".join(f"{name} {count:,} tokens ({count / total:.1%})" for name, count in tokens.items())


def _score_table(before: Scores | None, after: Scores) -> Table:
    table = Table(title="Scores on held-out records")
    columns = [("before training", before)] if before is not None else []
    columns += [("after training", after)]
    table.add_column("")
    for title, _ in columns:
        table.add_column(title, justify="right")
    for metric in after.metrics:
        table.add_row(_METRIC_TEXTS[metric], *(_score_text(metric, scores) for _, scores in columns))
    return table


def _score_text(metric: str, scores: Scores) -> str:
    """A score in the form of its metric; "-" where it was not measured."""
    score = scores.metrics.get(metric)
    if score is None:
        return "-"
    if metric == HELD_OUT_LOSS:
        return f"{score:.4f}"
    if metric == EXACT_MATCH and scores.exact is not None:
        return f"{scores.exact.right} of {len(scores.exact.answers)}, {score:.0%}"
    return f"{score:.1%}"


def _print_answers(console: Console, before: Score | None, after: Score) -> None:
    for index, new in enumerate(after.answers[:_SHOWN_ANSWERS]):
        console.print(f"\n{new.problem.prompt}", markup=False, soft_wrap=True)
        if before is not None:
            old = _one_line(before.answers[index].generated)
            console.print(f"  before: {old}", markup=False, soft_wrap=True)
        mark = "right" if new.is_right else "wrong"
        console.print(f"  after:  {_one_line(new.generated)}  [{mark}]", markup=False, soft_wrap=True)
        console.print(f"  true:   {_one_line(new.problem.answer)}", markup=False, soft_wrap=True)
    console.print()


def _one_line(text: str, longest: int = 120) -> str:
    flat = " / ".join(text.split("\n"))
    return flat if len(flat) <= longest else f"{flat[:longest]} ..."
