"""Estimates on the plan's page, in its JSON, and as the exit status of the command."""

from __future__ import annotations

import json

import pytest

from tests.estimate.workloads import ROOT, llama3_plan, small_plan
from tptrain import cli
from tptrain.estimate import estimate
from tptrain.estimate.text import seconds_text
from tptrain.report.estimate_page import verdict_sentence
from tptrain.report.plan_page import plan_json, plan_page

LLAMA = str(ROOT / "recipes" / "llama3_8b_gsm8k.py")


def test_the_page_has_every_part() -> None:
    page = " ".join(plan_page(llama3_plan("v5p-32", 512, 64)).split())
    for text in (
        "Memory of a chip, estimated",
        "of the 95.74 GiB that libtpu lets a program use on a v5p chip: it fits, with 10% to spare.",
        "; remat full, attention plain (scores in memory).",
        "optimizer state 3.74 GiB",
        "Memory of each of 4 hosts beside the process itself, and disk",
        "Loading: 3.50 GiB. Saving: 26.92 GiB at most",
        "Checkpoint: 89.75 GiB on disk; up to 3 at a time: 269.24 GiB.",
        "Export: 14.96 GiB on disk",
        "Traffic of a step, expected: what one chip receives",
        "all-gather fsdp (ICI) weights: layers, forward 224 x 12.19 GiB 43.6 ms",
        "mesh.fsdp lies on sides 2 x 2 x 4 of the slice: 300 GB/s into a chip.",
        "Time of a step, a roofline: no step is faster, real ones are slower",
        "Arithmetic: 1,488.7 TFLOP (6 x parameters in matrix products x tokens + causal attention)",
    ):
        assert text in page, text


def test_the_parts_add_up_on_the_page() -> None:
    page = plan_page(small_plan())
    assert "cpu devices have no limit of their own." in page
    assert "The virtual devices are in the host's memory, too:" in page
    assert "Time of a step" not in page
    assert "Traffic of a step, expected: what one chip receives\n  none." in plan_page(
        small_plan("topology=cpu-1")
    )


def test_notices_are_with_those_of_the_plan() -> None:
    plan = llama3_plan("2xv5p-32", 512, 64, "mesh.dcn_fsdp=2", "mesh.dcn_data=1")
    (notice,) = (line for line in plan_page(plan).splitlines() if "Between slices" in line)
    assert notice.startswith("  - Between slices a step moves data for 221 ms and computes for 124 ms")
    assert notice.endswith("mesh.dcn_fsdp=1 mesh.dcn_data=-1 sends gradients alone, once a micro-batch.")
    (small,) = (each for each in estimate(plan).notices if "Within a slice" in each)
    assert "With 2 rows at a time on a chip the batch is small; from 3 on, computing takes longer." in small


def test_an_axis_that_takes_a_part_of_a_side_is_noticed() -> None:
    plan = llama3_plan("v6e-256", 512, 256, "mesh.tensor=4")
    notices = [each for each in estimate(plan).notices if "does not take whole sides" in each]
    assert [each.split()[0] for each in notices] == ["mesh.tensor=4", "mesh.fsdp=64"]
    assert all("(16x16)" in each and "Products of sides: 16, 256." in each for each in notices)
    assert not any("whole sides" in each for each in estimate(llama3_plan("v6e-256", 512, 256)).notices)


def test_verdict_sentences() -> None:
    words = {
        "fits": "it fits, with 10% to spare.",
        "tight": "tight: less than 10% to spare, and the estimate may be off by as much.",
        "does not fit": "it does not fit.",
    }
    seen = set()
    for rows in range(64, 512, 16):
        plan = llama3_plan("v6e-16", 1024, rows)
        found = estimate(plan)
        sentence = verdict_sentence(plan, found)
        assert sentence.startswith("By the estimate a step needs ")
        assert sentence.endswith(words[found.verdict])
        seen.add(found.verdict)
    assert seen == words.keys()


def test_json_round_trip() -> None:
    plan = llama3_plan("2xv5p-32", 512, 64)
    data = plan_json(plan)
    assert json.loads(json.dumps(data)) == data
    chip = data["estimate"]["chip"]
    assert chip["total_bytes"] == chip["argument_bytes"] + chip["temporary_bytes"]
    assert chip["temporary_bytes"] == sum(chip["phases"][chip["peak"]].values())
    assert sum(chip["arguments"].values()) == chip["argument_bytes"]
    assert (chip["verdict"], chip["usable_hbm_bytes"]) == ("fits", plan.topology.chip.hbm_bytes)
    assert {each["network"] for each in data["estimate"]["collectives"]} == {"ICI", "DCN"}
    assert data["estimate"]["roofline"]["mfu"] < 1
    assert data["estimate"]["host"]["checkpoint_bytes"] == 12 * data["num_parameters"]


def test_plan_prints_everything_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--json"]):
        assert cli.main(["plan", LLAMA, "topology=v5e-4", *more]) == 2
        told = capsys.readouterr()
        assert "model.layers" in told.out
        assert "does not fit" in told.out
        assert told.err.startswith(
            "tptrain: 1 problem:\n  - topology=v5e-4: needs more memory than a chip has"
        )
        assert "; use topology=v5e-16, or model.trainable=model.layers.*.self_attn.*\n" in told.err


def test_seconds_text() -> None:
    assert [seconds_text(s) for s in (0, 3.334e-6, 0.0436, 1.234, 126)] == [
        "0 s",
        "3.33 µs",
        "43.6 ms",
        "1.23 s",
        "126 s",
    ]
