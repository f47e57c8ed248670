# ruff: noqa: E501 (lines as libtpu writes them)
"""Copies between the memories of chip and host, in the form in which libtpu 0.0.21 and 0.0.52 write them."""

from __future__ import annotations

import pytest

from tptrain.program.analysis import ProgramCost, analyse
from tptrain.program.device_groups import MeshPlaces
from tptrain.program.hlo_text import parse_module
from tptrain.topology import parse_topology

# A turn writes bf16[1,16,384] while 60,000 cycles run, and reads f32[1,8] back, which it waits for.
STEP = r"""HloModule step, is_scheduled=true, num_partitions=4

%out (p.0: bf16[6,16,384], p.1: bf16[1,16,384], p.2: s32[]) -> bf16[6,16,384] {
  %p.0 = bf16[6,16,384]{2,1,0:T(8,128)(2,1)S(5)} parameter(0)
  %p.1 = bf16[1,16,384]{2,1,0:T(8,128)(2,1)} parameter(1)
  %p.2 = s32[]{:T(128)} parameter(2)
  ROOT %dus = bf16[6,16,384]{2,1,0:T(8,128)(2,1)S(5)} dynamic-update-slice(%p.0, %p.1, %p.2, %p.2, %p.2)
}

%in (q.0: f32[6,8], q.1: s32[]) -> f32[1,8] {
  %q.0 = f32[6,8]{1,0:T(8,128)S(5)} parameter(0)
  %q.1 = s32[]{:T(128)} parameter(1)
  ROOT %ds = f32[1,8]{1,0:T(8,128)} dynamic-slice(%q.0, %q.1, %q.1), dynamic_slice_sizes={1,8}
}

%within (r.0: f32[6,8], r.1: s32[]) -> f32[1,8] {
  %r.0 = f32[6,8]{1,0:T(8,128)} parameter(0)
  %r.1 = s32[]{:T(128)} parameter(1)
  ROOT %ds.1 = f32[1,8]{1,0:T(8,128)} dynamic-slice(%r.0, %r.1, %r.1), dynamic_slice_sizes={1,8}
}

ENTRY %main (x: bf16[1,16,384], i: s32[], w: f32[6,8]) -> bf16[6,16,384] {
  %x = bf16[1,16,384]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %w = f32[6,8]{1,0:T(8,128)} parameter(2)
  %a = bf16[6,16,384]{2,1,0:T(8,128)(2,1)S(5)} custom-call(), custom_call_target="AllocateBuffer"
  %b = f32[6,8]{1,0:T(8,128)S(5)} custom-call(), custom_call_target="AllocateBuffer"
  %s = ((bf16[6,16,384]{2,1,0:S(5)}, bf16[1,16,384]{2,1,0}, s32[]), bf16[6,16,384]{2,1,0:S(5)}, u32[]{:S(2)}) async-start(%a, %x, %i), calls=%out
  %work = f32[6,8]{1,0:T(8,128)} copy(%w), backend_config={"estimated_cycles":"60000"}
  %t = ((f32[6,8]{1,0:S(5)}, s32[]), f32[1,8]{1,0}, u32[]{:S(2)}) async-start(%b, %i), calls=%in
  %t.1 = f32[1,8]{1,0:T(8,128)} async-done(%t)
  %u = ((f32[6,8]{1,0}, s32[]), f32[1,8]{1,0}, u32[]{:S(2)}) async-start(%w, %i), calls=%within
  %u.1 = f32[1,8]{1,0:T(8,128)} async-done(%u)
  %c = (f32[6,8]{1,0:S(1)}, f32[6,8]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %c.1 = f32[6,8]{1,0:S(1)} copy-done(%c)
  %d = (f32[6,8]{1,0}, f32[6,8]{1,0:S(5)}, u32[]{:S(2)}) copy-start(%b)
  %d.1 = f32[6,8]{1,0} copy-done(%d)
  ROOT %s.1 = bf16[6,16,384]{2,1,0:T(8,128)(2,1)S(5)} async-done(%s)
}
"""


def cost(topology: str) -> ProgramCost:
    mesh = MeshPlaces(parse_topology(topology), {"fsdp": 4}, (0, 1, 2, 3))
    return analyse(parse_module(STEP), mesh, attention_density=0.5)


@pytest.mark.parametrize(("topology", "speed"), [("v5e-4", 15e9), ("v6e-4", 32e9)])
def test_bytes_and_what_is_waited_for(topology: str, speed: float) -> None:
    found = cost(topology)
    out, back = 16 * 384 * 2, 8 * 4 + 6 * 8 * 4
    table = {(use.kind, use.dtype): use for use in found.collectives}
    assert set(table) == {("copy to host", "bf16"), ("copy from host", "f32")}
    assert all((use.network, use.axes) == ("PCIe", ("host",)) for use in found.collectives)
    to_host, from_host = table["copy to host", "bf16"], table["copy from host", "f32"]
    assert (to_host.executions, to_host.num_bytes) == (1, out)
    assert (from_host.executions, from_host.num_bytes) == (2, back)
    assert to_host.seconds == pytest.approx(out / speed)
    # 60,000 cycles are longer than 12,288 bytes take.
    assert (to_host.exposed_seconds, found.notices) == (0.0, ())
    assert from_host.exposed_seconds == pytest.approx(back / speed)
    assert found.exposed_seconds == pytest.approx(back / speed)
