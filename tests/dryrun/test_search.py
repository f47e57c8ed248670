"""`tptrain search`: layouts counted by hand, ranking, refusals, price, interruption, and one real compile."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.config.samples import small_recipe
from tptrain import cli
from tptrain.config.overrides import apply_overrides
from tptrain.config.recipe_file import load_recipe
from tptrain.dryrun import compiling
from tptrain.dryrun import search as search_module
from tptrain.dryrun.search import INTERRUPTED, SearchOptions, read_options, search, search_page
from tptrain.errors import ProblemsError
from tptrain.estimate.candidates import SEARCHED, Candidate, Survey, layouts
from tptrain.program.analysis import ProgramCost
from tptrain.program.compiled import CompiledProgram, Outcome
from tptrain.report.search_page import SearchRow, cost_per_billion_tokens, ordered, search_lines
from tptrain.topology import parse_topology

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "recipes" / "tiny_gsm8k.py")
# data, fsdp, tensor of four devices.
MESHES_OF_4 = {(1, 4, 1), (1, 2, 2), (1, 1, 4), (2, 2, 1), (2, 1, 2), (4, 1, 1)}


def found_layouts(*overrides: str, held: Sequence[str] = (), multiples: Sequence[int] = (1,)) -> list[Any]:
    """data, fsdp, tensor, remat, rows, accumulation of every layout on four devices."""
    recipe = apply_overrides(small_recipe(), ["topology=cpu-4", *overrides])
    found = layouts(recipe, parse_topology("cpu-4"), held, multiples)
    return [tuple(layout[path] for path in SEARCHED) for layout in found]


def surveyed(*overrides: str, held: Sequence[str] = ("remat.policy",)) -> Survey:
    recipe = apply_overrides(small_recipe(), overrides)
    survey = Survey()
    for layout in layouts(recipe, parse_topology(recipe.topology), held):
        survey.look_at(recipe, layout)
    return survey


def program(outcome: Outcome, score_seconds: float | None = None) -> CompiledProgram:
    cost = None
    if score_seconds is not None:
        sizes: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(ProgramCost)}
        lists = {"collectives": (), "kernels": (), "notices": ()}
        cost = ProgramCost(**{**sizes, **lists, "score_seconds": score_seconds})
    message = "" if outcome == "compiled" else "what the compiler said"
    return CompiledProgram(outcome, message, "v5e-4", {}, "0", "", {}, 1.0, 1, cost=cost)


def test_every_layout_once() -> None:
    found = found_layouts("data.batch_rows=6")
    assert len(found) == len(set(found)) == 6 * 4 * 4
    expected = {
        (str(data), str(fsdp), str(tensor), remat, "6", count)
        for data, fsdp, tensor in MESHES_OF_4
        for remat in ("none", "dots", "attention", "full")
        for count in ("1", "2", "3", "6")
    }
    assert set(found) == expected


def test_what_the_command_line_gives_is_kept() -> None:
    given = ("data.batch_rows=6", "mesh.tensor=2", "remat.policy=dots", "mesh.fsdp=-1")
    held = [arg.partition("=")[0] for arg in given]
    assert set(found_layouts(*given, held=held)) == {
        (*mesh, "2", "dots", "6", count)
        for mesh in (("1", "2"), ("2", "1"))
        for count in ("1", "2", "3", "6")
    }


def test_other_batch_rows_only_when_asked() -> None:
    held = ("mesh.tensor", "mesh.data", "remat.policy")
    given = ("data.batch_rows=6", "mesh.data=2")
    found = found_layouts(*given, held=held, multiples=(1, 2))
    assert {row[4:] for row in found} == {
        *(("6", count) for count in ("1", "2", "3", "6")),
        *(("12", count) for count in ("1", "2", "3", "4", "6", "12")),
    }
    assert read_options(["--batch", "4,2", "x=1"])[0].row_multiples == (1, 2, 4)
    assert read_options([])[0].row_multiples == (1,)


def test_refusals_are_grouped_and_counted() -> None:
    # 10 meshes of 8 devices, 8 rows in 1, 2, 4 or 8 micro-batches: they divide the rows of a device only
    # up to the size of the tensor axis; 4 kv heads are not divided by 8.
    survey = surveyed("topology=cpu-8", "data.batch_rows=8")
    refusals = [(one.problem.setting, one.count) for one in survey.refusals()]
    assert refusals == [("data.batch_rows", 4 * 3 + 3 * 2 + 2 * 1), ("mesh.tensor", 4)]
    assert "num_key_value_heads" in survey.refusals()[1].problem.rule
    assert len(survey.candidates) == 4 * 1 + 3 * 2 + 2 * 3


def test_ranking() -> None:
    # Four chips, 48 rows, one micro-batch: all six meshes can be planned.
    survey = surveyed("topology=v5e-4", held=("remat.policy", "optim.accumulation"))
    ranked = survey.ranked()
    assert len(ranked) == 6
    bounds = [one.bound_seconds or 0.0 for one in ranked]
    assert bounds == sorted(bounds) and bounds[0] > 0
    first, second, third, *_, last = ranked
    rows = [
        SearchRow(first, program("out_of_memory")),
        SearchRow(second, program("compiled", 0.5)),
        SearchRow(third),
        SearchRow(last, program("compiled", 0.25)),
        SearchRow(ranked[3], failure="no such op"),
    ]
    best = ordered(rows)
    assert [row.candidate for row in best[:3]] == [last, second, third]
    assert {row.verdict for row in best[3:]} == {"does not fit, compiled", "not traced"}
    assert [row.basis for row in best[:3]] == ["compiled", "compiled", "roofline"]
    # 48 rows of 256 tokens over four chips.
    assert best[0].tokens_per_second_per_chip == 48 * 256 / 0.25 / 4
    assert best[2].seconds == third.bound_seconds


def test_what_was_tried_is_always_in_the_table() -> None:
    survey = surveyed("topology=v5e-4", held=())
    ranked = survey.ranked()
    assert len(ranked) > 25
    tried = [SearchRow(ranked[0], program("out_of_memory")), SearchRow(ranked[1], program("compiled", 0.5))]
    page = search_page(survey, tried, ["topology=v5e-4", "mesh.tensor=-1"], 3.6, finished=True)
    lines = search_lines(page)
    number = len(page.rows)
    assert any("does not fit, compiled" in line and line.startswith(f"{number}  ") for line in lines)
    assert f"  Row {number}: what the compiler said" in lines
    # 3.6 USD an hour are 0.001 USD a second, for 48 x 256 / 0.5 / 4 tokens.
    (best,) = (line.split() for line in lines if line.split()[:1] == ["1"])
    assert best[-5:] == ["500", "ms", "6,144", "162.76", "compiled"]
    pasted = lines[lines.index("Overrides of the best:") + 1].split()
    assert pasted == ["topology=v5e-4", *(f"{path}={ranked[1].changes[path]}" for path in SEARCHED)]
    assert apply_overrides(small_recipe(), pasted) == ranked[1].plan.recipe


def test_price() -> None:
    assert cost_per_billion_tokens(4.5, 5000.0) == pytest.approx(4.5 * (1e9 / 5000) / 3600)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--compile", "some"], "--compile=some: must be a whole number, at least 0"),
        (["--batch=0"], "--batch=0: must be a whole number, at least 1"),
        (["--price", "free"], "--price=free: must be a number above 0"),
        (["--price=-1"], "--price=-1: must be a number above 0"),
        (["--cache"], "--cache=: needs a value"),
    ],
)
def test_wrong_options_are_refused(args: list[str], message: str) -> None:
    with pytest.raises(ProblemsError) as caught:
        read_options(args)
    assert message in str(caught.value)


def test_nothing_that_can_be_planned_is_refused_with_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", TINY, "topology=cpu-4", "data.batch_rows=4", "data.seq_len=600"]) == 2
    out = capsys.readouterr()
    assert out.out == "" and "data.seq_len=600: must not exceed the model's positions" in out.err


def test_a_slice_on_which_nothing_fits_is_refused_with_what_would_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", "/nowhere")
    recipe = str(ROOT / "recipes" / "llama3_8b_gsm8k.py")
    given = ["topology=v5e-8", "remat.policy=full", "mesh.tensor=1"]
    assert cli.main(["search", recipe, *given, "--compile=0"]) == 2
    out = capsys.readouterr()
    # 8 chips as data x fsdp in four ways; 64 rows in 1, 2, 4 or 8 micro-batches, or 16, 32 or 64, too small.
    assert "28 layouts looked at; 12 refused, 16 larger than a chip's or a host's memory" in out.out
    assert "topology=v5e-8: must have a layout that can run" in out.err
    # Twelve bytes a parameter over eight chips leave no room for gradients; the moments have to shrink.
    assert "optim." in out.err and "mesh.fsdp=8" in out.err


def test_devices_without_published_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", TINY, "topology=cpu-2", "remat.policy=full"]) == 0
    out = capsys.readouterr().out
    assert "no published numbers" in out and "unknown" in out and "compiled:" not in out


def test_an_interruption_shows_what_is_known(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Candidate] = []

    def once(candidate: Candidate, options: SearchOptions) -> SearchRow:
        asked.append(candidate)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return SearchRow(candidate, program("compiled", 0.125))

    monkeypatch.setattr(search_module, "compiled_row", once)
    monkeypatch.setattr(search_module, "_check_compiler", lambda libtpu: None)
    given = ["topology=v5e-4", "remat.policy=full"]
    assert search(load_recipe(TINY), given, SearchOptions(compiles=3)) == INTERRUPTED
    out = capsys.readouterr().out
    assert out.count("fits, compiled") == 1 and "Interrupted: the same command goes on" in out
    assert asked[0].order <= asked[1].order


def test_an_interruption_of_the_arithmetic(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    look_at, seen = Survey.look_at, []

    def interrupted(survey: Survey, *args: Any) -> None:
        seen.append(args)
        if len(seen) == 4:
            raise KeyboardInterrupt
        look_at(survey, *args)

    monkeypatch.setattr(Survey, "look_at", interrupted)
    assert search(load_recipe(TINY), ["topology=cpu-4"], SearchOptions()) == INTERRUPTED
    assert "3 layouts looked at" in capsys.readouterr().out


def test_a_real_search_compiles_once_and_goes_on_from_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XLA_FLAGS", "CPU_NUM_DEVICES"):
        if name in os.environ:
            monkeypatch.delenv(name)
    given = ["topology=v5e-4", "data.batch_rows=8", "remat.policy=full", "data.path=train.jsonl"]
    options = SearchOptions(compiles=1, cache=tmp_path, as_json=True, price=1.2)

    def result() -> dict[str, Any]:
        assert search(load_recipe(TINY), given, options) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    first = result()
    best = first["rows"][0]
    assert (best["basis"], best["verdict"], best["cached"]) == ("compiled", "fits, compiled", False)
    assert best["step_seconds"] > 0 and best["step_tokens"] == 8 * 256
    speed = best["tokens_per_second_per_chip"]
    assert speed == pytest.approx(8 * 256 / 4 / best["step_seconds"])
    assert best["usd_per_billion_tokens"] == pytest.approx(1.2 / 3600 * 1e9 / speed)
    assert {row["basis"] for row in first["rows"][1:]} == {"roofline"}

    started: list[object] = []
    monkeypatch.setattr(compiling, "_run_child", lambda *what: started.append(what) or -9)
    again = result()
    assert not started and again["rows"][0] == {**best, "cached": True}
    assert again["rows"][1:] == first["rows"][1:]
