"""Flags of the TPU compiler: written out, chosen for the chip, and both."""

from __future__ import annotations

from pathlib import Path

import pytest

from tptrain.config import Plan
from tptrain.config.compiler_flags import compiler_flags
from tptrain.config.overrides import apply_overrides
from tptrain.config.planning import plan_recipe
from tptrain.config.recipe_file import load_recipe
from tptrain.report.plan_page import plan_json, plan_page

LLAMA = Path(__file__).resolve().parents[2] / "recipes" / "llama3_8b_gsm8k.py"
VMEM, COLLECTIVE_MATMUL = (
    "xla_tpu_scoped_vmem_limit_kib",
    "xla_jf_spmd_threshold_for_windowed_einsum_mib",
)


def plan_of(*overrides: str) -> Plan:
    return plan_recipe(apply_overrides(load_recipe(LLAMA), ["data.path=x.jsonl", *overrides]), {})


@pytest.mark.parametrize("topology", ["v5e-16", "v5p-32", "v6e-16"])
def test_auto_gives_the_chip_its_flags_and_the_page_names_them(topology: str) -> None:
    plan = plan_of(f"topology={topology}")
    assert plan.tpu_flags == {
        VMEM: "98304" if topology.startswith("v6e") else "49152",
        COLLECTIVE_MATMUL: "1000000",
    }
    assert f"Compiler: --{VMEM}={plan.tpu_flags[VMEM]} --{COLLECTIVE_MATMUL}=1000000." in plan_page(plan)
    assert plan_json(plan)["tpu_flags"] == plan.tpu_flags


def test_a_chip_without_evidence_keeps_the_default_memory() -> None:
    assert plan_of("topology=v4-32").tpu_flags == {COLLECTIVE_MATMUL: "1000000"}


def test_flags_written_out_stand_alone_or_beside_the_chosen_ones() -> None:
    assert plan_of("topology=v5p-32", f"compiler.tpu_flags=--{VMEM}=32768").tpu_flags == {VMEM: "32768"}
    beside = plan_of("topology=v5p-32", f"compiler.tpu_flags=auto --{VMEM}=32768 --xla_a=b").tpu_flags
    assert beside == {VMEM: "32768", COLLECTIVE_MATMUL: "1000000", "xla_a": "b"}
    none = plan_of("topology=v5p-32", "compiler.tpu_flags=default")
    assert none.tpu_flags == {} and "Compiler: no flags." in plan_page(none)


def test_no_word_of_a_compiler_where_there_is_none() -> None:
    plan = plan_of("topology=cpu-8", "data.batch_rows=8")
    assert "Compiler:" not in plan_page(plan) and plan_json(plan)["tpu_flags"] == {}


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("--xla_a=1 auto", "^auto$"),
        ("default --xla_a=1", "^default$"),
        ("fast", "^fast$"),
        ("--xla_a", "^--xla_a$"),
        ("--xla_a=1 --xla_a=2", "^--xla_a=2$"),
    ],
)
def test_what_is_neither_flag_nor_word_is_refused(text: str, bad: str) -> None:
    with pytest.raises(ValueError, match=bad):
        compiler_flags(text)
