"""`tptrain dryrun` as a user types it: all tiers of a small recipe, options, refusals, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tptrain.backends.make import countable
from tptrain.dryrun.command import read_options
from tptrain.errors import ProblemsError

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/tiny_gsm8k.py"


def dryrun(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tptrain", "dryrun", RECIPE, "data.path=train.jsonl", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def found(*args: str) -> dict[str, Any]:
    done = dryrun(*args, "--json")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Cache and result of all three tiers on a slice of four chips."""
    cache = tmp_path_factory.mktemp("cache")
    flags = "compiler.tpu_flags=--xla_tpu_enable_latency_hiding_scheduler=true"
    return cache, found("topology=v5e-4", "data.batch_rows=8", flags, f"--cache={cache}")


def test_all_tiers_tell_of_one_step(compiled: tuple[Path, dict[str, Any]]) -> None:
    _, result = compiled
    plan, trace, program = result["plan"], result["trace"], result["program"]
    state = plan["state_bytes_per_device"]
    batch = 5 * 4 * 8 // 4 * plan["tokens_per_step"] // 8  # five arrays of 4 bytes, 8 rows over 4 chips
    assert program["outcome"] == "compiled" and program["axis_sizes"]["fsdp"] == 4
    assert state <= program["memory"]["argument_bytes"] <= 1.05 * (state + batch) + 2**20
    # All state is written in place.
    assert program["memory"]["aliased_bytes"] >= state
    donated = [parameter["name"] for parameter in trace["parameters"] if parameter["donated"]]
    assert len(donated) == len(program["aliased_parameters"]) and "params/model.norm.weight" in donated
    assert trace["is_steady"] and trace["changed_specs"] == []
    assert program["flags"] == {"xla_tpu_enable_latency_hiding_scheduler": "true"}
    assert {use["dtype"] for use in program["cost"]["collectives"] if use["kind"] == "all-gather"} <= {
        "bf16",
        "s32",
    }


def test_the_same_step_is_not_compiled_again(compiled: tuple[Path, dict[str, Any]]) -> None:
    cache, first = compiled
    flags = "compiler.tpu_flags=--xla_tpu_enable_latency_hiding_scheduler=true"
    # The learning rate is an input of the program.
    again = found("topology=v5e-4", "data.batch_rows=8", flags, "optim.learning_rate=0.5", f"--cache={cache}")
    assert again["program"]["cached"] and again["program"]["memory"] == first["program"]["memory"]


def test_cpu_devices_have_a_trace_and_no_tpu_compiler() -> None:
    done = dryrun("topology=cpu-2")
    assert done.returncode == 0, done.stderr
    assert "Trace for 2 devices" in done.stdout and "Compile for" not in done.stdout


def test_a_plan_alone_starts_no_framework() -> None:
    done = dryrun("topology=v5p-32", "--until", "plan")
    assert done.returncode == 0 and "Memory of a chip" in done.stdout and "Trace for" not in done.stdout


def test_hundreds_of_chips_are_traced() -> None:
    result = found(
        "topology=v5e-256", "data.batch_rows=256", "mesh.fsdp=64", "mesh.data=4", "--until", "trace"
    )
    assert result["plan"]["num_devices"] == 256 and result["program"] is None
    assert result["trace"]["is_steady"] and result["trace"]["peak_host_bytes"] < 6 * 2**30


@pytest.mark.parametrize(
    ("chips", "opened"), [(1, 1), (127, 127), (128, 257), (256, 257), (300, 300), (896, 1025), (1024, 1025)]
)
def test_devices_are_opened_in_a_number_that_eight_bits_can_count(chips: int, opened: int) -> None:
    assert countable(chips) == opened


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--until", "run"], "--until=run: is not a known tier"),
        (["--until"], "--until=: needs a value"),
        (["--libtpu"], "--libtpu=: needs a value"),
    ],
)
def test_wrong_options_are_refused(args: list[str], message: str) -> None:
    with pytest.raises(ProblemsError) as caught:
        read_options(args)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["topology=v5q-32"], "v5p-32"),
        (["topology=v5e-4", "--libtpu", "nowhere.so"], "nowhere.so"),
        (["topology=cpu-2", "--until", "compile"], "--until=compile: needs a slice"),
        (["topology=v5e-4", "--until", "plan", "--cache", "here"], "--cache=here: has no effect"),
        (["topology=cpu-1", "backend=torch"], "backend=torch: has no step to trace"),
        (["topology=v5e-4", "compiler.tpu_flags=xla_x"], "compiler.tpu_flags=xla_x: must be flags"),
    ],
)
def test_what_cannot_be_run_dry_is_told_in_one_message(args: list[str], message: str) -> None:
    done = dryrun(*args)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
