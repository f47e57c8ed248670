"""Guards and held-out loss on the XLA backend: what the oracle does, from programs compiled once."""

import io
import math

import pytest
from rich.console import Console

from tests.small_run import small_recipe
from tests.spoiled import enormous, not_a_number, spoil
from tptrain.config import (
    DataSection,
    EvalSection,
    ExportSection,
    GuardsSection,
    OptimSection,
    ScheduleSection,
)
from tptrain.config.planning import plan_recipe
from tptrain.train.journal import read_events, read_journal
from tptrain.train.run import train


def journal_of(pretrained, records, folder, backend):
    """Twelve steps, two of them spoiled, with an evaluation after each fourth."""
    plan = plan_recipe(
        small_recipe(
            pretrained,
            records,
            folder,
            topology="cpu-1",
            backend=backend,
            data=DataSection(
                path=str(records), preset="gsm8k", seq_len=112, batch_rows=8, max_records=90, validation=0.2
            ),
            schedule=ScheduleSection(max_steps=12),
            # Small, so that the float32 noise of one backend beside the other stays small, too.
            optim=OptimSection(learning_rate=1e-4),
            guards=GuardsSection(non_finite="skip", spike_factor=4, window=3),
            eval=EvalSection(every_steps=4),
            export=ExportSection(enabled=False),
        )
    )
    train(plan, Console(file=io.StringIO()))
    events = read_events(folder / "journal.jsonl")
    scores = [e.metrics["held_out_loss"] for e in events if e.phase == "eval" and e.event == "end"]
    return read_journal(folder / "journal.jsonl"), scores


def test_xla_skips_and_scores_as_the_oracle_and_compiles_nothing_later(
    pretrained, records, tmp_path, monkeypatch
):
    spoil(monkeypatch, {6: enormous, 9: not_a_number})
    ours, scores = journal_of(pretrained, records, tmp_path / "xla", "xla")
    theirs, expected = journal_of(pretrained, records, tmp_path / "torch", "torch")
    assert {r.step: r.skipped for r in ours if r.skipped} == {6: "spike", 9: "non_finite"}
    assert [r.skipped for r in ours] == [r.skipped for r in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4, nan_ok=True), one.step
    assert math.isnan(ours[8].loss) and ours[5].grad_norm > 100
    assert len({r.compiles for r in ours}) == 1, "limits, spoiled batches and evaluations compile nothing"
    assert len(scores) == 4 and scores == pytest.approx(expected, rel=1e-5)
    assert scores[-1] < scores[0]
