"""Memory read from libtpu's buffer assignment, and its messages of a program that does not fit."""

from __future__ import annotations

import pytest

from tptrain.program.buffers import Buffer, OutOfMemory, hbm_use, out_of_memory
from tptrain.program.hlo_text import parse_module

# From a program that does not fit into a v5e chip; libtpu 0.0.52 says `page 0`, 0.0.24 does not.
ASSIGNMENT = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <14 add.2 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 4294967296, maybe-live-out:
 value: <73 fusion.3{1} @0> (size=4294967296,offset=0): f32[32768,32768]{1,0:T(8,128)}
allocation 2: size 3221225472, page 0, parameter 1, shape |f32[32768,24576]| at ShapeIndex {}:
 value: <40 param.1 @0> (size=3221225472,offset=0): f32[32768,24576]{1,0:T(8,128)}
allocation 3: size 2147483648, parameter 0, shape |f32[16384,32768]| at ShapeIndex {}:
 value: <41 param.0 @0> (size=2147483648,offset=0): f32[16384,32768]{1,0:T(8,128)}
allocation 22: size 1024, color 6, preallocated-temp:
 value: <60 copy-start.1 @6> (size=1024,offset=0): u32[4]{0:T(128)}
allocation 24: size 12884902400, preallocated-temp:
 value: <60 wide.param.2{1} (phi) @0> (size=8589934592,offset=0): f32[32768,65536]{1,0:T(8,128)}
 value: <70 fusion @0> (size=8589934592,offset=0): f32[32768,65536]{1,0:T(8,128)}
 value: <71 all-reduce.1 @0> (size=4294967296,offset=8589934592): bf16[32768,65536]{1,0:T(8,128)(2,1)}
 value: <72 copy.5 @0> (size=4294967296,offset=4294967296): bf16[32768,65536]{1,0:T(8,128)(2,1)}
 value: <74 copy-start{} @0> (size=512,offset=12884901888): (u32[4]{0:T(128)S(1)}, u32[]{:S(2)})

Total bytes used: 22548579848 (21.00GiB)

Used values:
<0 reduce_sum.3 @0>
allocation 99: size 7, preallocated-temp:
"""
MODULE = parse_module(
    """HloModule m

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2] parameter(0)
  %fusion = f32[2] copy(%x), metadata={op_name="jit(f)/up"}
  %all-reduce.1 = f32[2] copy(%x), metadata={op_name="jit(f)/down"}
  ROOT %fusion.3 = f32[2] copy(%x)
}
"""
)
GIB = 2**30


def test_hbm_is_the_allocations_without_a_color() -> None:
    use = hbm_use(ASSIGNMENT, None)
    assert use.total_bytes == (4 + 3 + 2 + 12) * GIB + 512
    assert use.temporary_bytes == 12 * GIB + 512


def test_the_largest_buffers_by_name() -> None:
    use = hbm_use(ASSIGNMENT, MODULE, parameter_names=("model.embed_tokens.weight",), count=5)
    assert use.largest == (
        Buffer("jit(f)/up", "f32[32768,65536]", 8 * GIB, "temporary"),
        Buffer("fusion.3", "f32[32768,32768]", 4 * GIB, "output"),
        Buffer("jit(f)/down", "bf16[32768,65536]", 4 * GIB, "temporary"),
        Buffer("parameter 1", "f32[32768,24576]", 3 * GIB, "argument"),
        Buffer("model.embed_tokens.weight", "f32[16384,32768]", 2 * GIB, "argument"),
    )


def test_a_value_in_memory_already_listed_is_left_out() -> None:
    names = [buffer.name for buffer in hbm_use(ASSIGNMENT, MODULE).largest]
    assert "copy.5" not in names and "copy-start" in names


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used"
            " 16.00G of 15.75G hbm. Exceeded hbm capacity by 258.14M.",
            OutOfMemory(16 * GIB, 16911433728),
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory"
            " required for HLO temporaries (28.00G) exceeds available HBM (15.75G). HLO module: jit_f.",
            OutOfMemory(28 * GIB, 16911433728),
        ),
        ("Ran out of memory in memory space vmem. Used 20.00M of 16.00M vmem.", None),
        ("INVALID_ARGUMENT: tile_assignment should have 6144 devices", None),
    ],
)
def test_messages(message: str, found: OutOfMemory | None) -> None:
    assert out_of_memory(message) == found
