"""HLO text read into data: shapes, operands, attributes that contain brackets and quotes."""

from __future__ import annotations

import pytest

from tests.program.snippets import STEP
from tptrain.program.hlo_text import Array, HloTextError, arrays_of, parse_module

MODULE = parse_module(STEP)


def test_the_header() -> None:
    assert (MODULE.name, MODULE.num_partitions, MODULE.entry.name) == ("jit_step", 4, "main.9_spmd")
    assert MODULE.aliased_parameters == (0, 2)
    assert MODULE.donated_parameters == (1,)
    assert len(MODULE.computations) == 10


def test_an_instruction_in_all_its_parts() -> None:
    gather = MODULE.computations["wide.body"].by_name["all-gather.48"]
    assert gather.opcode == "all-gather" and gather.operands == ("get-tuple-element.3",)
    assert gather.array == Array("bf16", (512, 640), memory_space=1)
    assert gather.array.num_bytes == 512 * 640 * 2
    assert gather.attribute("replica_groups") == "[2,2]<=[2,2]T(1,0)"
    assert gather.attribute("channel_id") == "14"
    assert gather.attribute("no_such") is None
    assert gather.estimated_cycles is None


def test_a_name_with_brackets_does_not_end_the_metadata() -> None:
    product = MODULE.computations["fused_product"].root
    assert product.op_name == "jit(step)/while/body/up (a) = {b}"
    assert product.estimated_cycles == 777_777


def test_calls_bodies_and_reducers_are_found() -> None:
    entry = MODULE.entry
    assert entry.by_name["while.6"].called == ("wide.condition", "wide.body")
    assert entry.by_name["slice-start"].called == ("async_computation",)
    assert MODULE.computations["wide.body"].by_name["all-reduce.13"].called == ("add.clone",)
    assert entry.by_name["tuple.63"].called == ()


def test_tuples_are_flattened_and_comments_left_out() -> None:
    loop = MODULE.entry.by_name["while.6"]
    assert [array.dims for array in loop.arrays] == [(), (), (12, 512), (256, 640), (640, 256), (640, 512)]
    assert loop.operands == ("tuple.192",)
    assert len(MODULE.entry.by_name["tuple.192"].operands) == 6


def test_no_estimate_is_none() -> None:
    assert MODULE.entry.by_name["broadcast.1"].estimated_cycles is None


@pytest.mark.parametrize(
    ("shape", "num_bytes"),
    [("f32[]", 4), ("s4[3,5]{1,0}", 8), ("pred[7]", 7), ("bf16[0,8]", 0), ("f8e4m3fn[3]", 3), ("c64[2]", 16)],
)
def test_bytes_of_an_array(shape: str, num_bytes: int) -> None:
    (array,) = arrays_of(shape)
    assert array.num_bytes == num_bytes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not an HLO module"),
        ("HloModule m\n\n%f (p: f32[]) -> f32[] {\n", "has no end"),
        ("HloModule m\n\n%f (p: f32[]) -> f32[] {\n}\n", "no ENTRY"),
        ("HloModule m\n\nENTRY %f () -> f32[] {\n  nonsense\n}\n", "not an HLO instruction"),
        ("HloModule m\n\nENTRY %f () -> f32[] {\n  %a = q7[2]{0} iota()\n}\n", "unknown element type 'q7'"),
        ("HloModule m\n\nENTRY %f () -> f32[] {\n  %a = f32[2]{0} iota(\n}\n", "a bracket is not closed"),
    ],
)
def test_other_text_is_refused(text: str, said: str) -> None:
    with pytest.raises(HloTextError, match=said):
        parse_module(text)
