"""What a run says at its start of the memory that a step needs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tests.estimate.workloads import llama3_plan, small_plan
from tptrain.config import Plan
from tptrain.data.batches import RunLength
from tptrain.train.best_so_far import BestSoFar
from tptrain.train.guards import Guards
from tptrain.train.loop import Progress
from tptrain.train.start import Start
from tptrain.train.summary import print_start


def _said(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=400)
    start = Start({}, Progress(0, 0), RunLength(40, None), (), BestSoFar(plan), Guards(plan))
    print_start(console, plan, start, True)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("rows", "words"),
    [(16, "it fits, with 10% to spare."), (256, "does not fit.")],
)
def test_a_tpu_run_notes_the_estimate_and_goes_on(rows: int, words: str) -> None:
    (line,) = (each for each in _said(llama3_plan("v6e-8", 2048, rows)).splitlines() if "estimate" in each)
    assert line.startswith("Note: By the estimate a step needs ")
    assert " that libtpu lets a program use on a v6e chip: " in line
    assert line.endswith(words)


def test_virtual_devices_have_no_limit_to_note() -> None:
    assert "estimate" not in _said(small_plan())
