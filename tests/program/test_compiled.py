"""The outcome of a compile as JSON and as text."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.program.snippets import STEP
from tests.program.test_analysis import MESH
from tptrain.program.analysis import analyse
from tptrain.program.buffers import Buffer, OutOfMemory
from tptrain.program.compiled import CompiledProgram, Memory
from tptrain.program.hlo_text import parse_module
from tptrain.report.program_lines import program_lines

GIB = 2**30
COMPILED = CompiledProgram(
    outcome="compiled",
    message="",
    topology="v5e-4",
    axis_sizes={"data": 1, "fsdp": 2, "tensor": 2},
    libtpu="0.0.24",
    libtpu_build="TFRT TPU v5 lite",
    flags={"xla_tpu_enable_async_collective_fusion": "false"},
    compile_seconds=12.6,
    peak_host_bytes=3 * GIB,
    memory=Memory(6 * GIB, 5 * GIB, 4 * GIB, 2 * GIB, 7 * 2**20, 0),
    largest_buffers=(Buffer("model.embed_tokens.weight", "f32[8,16]", 3 * GIB, "argument"),),
    aliased_parameters=(0, 2),
    donated_parameters=(1,),
    cost=analyse(parse_module(STEP), MESH, 0.5),
    notices=("compiled by libtpu 0.0.24; a run loads 0.0.21",),
)
TOO_LARGE = dataclasses.replace(
    COMPILED,
    outcome="out_of_memory",
    message="the program needs 28.00 GiB of HBM on each chip; 15.75 GiB are available",
    memory=None,
    cost=None,
    shortage=OutOfMemory(28 * GIB, 16911433728),
)


@pytest.mark.parametrize("program", [COMPILED, TOO_LARGE])
def test_json_and_back(program: CompiledProgram) -> None:
    text = program.to_json()
    assert CompiledProgram.from_json(text) == program
    assert json.loads(text)["topology"] == "v5e-4"


def test_other_json_is_refused() -> None:
    with pytest.raises(ValueError, match="outcome"):
        CompiledProgram.from_json('{"topology": "v5e-4"}')


def test_peak_counts_aliased_memory_once() -> None:
    assert COMPILED.memory is not None and COMPILED.memory.peak_bytes == 9 * GIB


def test_the_text_of_a_compiled_program() -> None:
    lines = program_lines(COMPILED, hbm_bytes=16 * GIB)
    text = "\n".join(lines)
    flags = "xla_tpu_enable_async_collective_fusion=false"
    assert lines[0] == f"Compile for v5e-4 (fsdp=2 x tensor=2), libtpu 0.0.24, {flags}: compiled, 13 s"
    assert "HBM per chip: 9.00 GiB of 16.00 GiB (56.2 %): arguments 6.00 GiB, temporaries 2.00 GiB" in text
    assert "an estimate" in text and "16,670 cycles" in text
    assert (
        "all-gather      fsdp (ICI)        2  bf16      6        1.88 MiB       0.039 ms    0.033 ms" in text
    )
    assert "  3.00 GiB  argument   f32[8,16]  model.embed_tokens.weight" in text
    assert lines[-1] == "  Notice: compiled by libtpu 0.0.24; a run loads 0.0.21."


def test_the_text_of_a_program_that_does_not_fit() -> None:
    lines = program_lines(TOO_LARGE, hbm_bytes=None)
    assert lines[0].endswith("out of memory, 13 s")
    assert lines[1] == "  the program needs 28.00 GiB of HBM on each chip; 15.75 GiB are available"
    assert lines[2] == "  Largest buffers in HBM of a chip:"
