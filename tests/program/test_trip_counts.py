"""Trip counts of loops, also of counters that libtpu has split into two words."""

from __future__ import annotations

import pytest

from tests.program.snippets import STEP
from tptrain.program.hlo_text import parse_module
from tptrain.program.walk import Walk

# One counter; the body may also change the limit. `{init}` and so on are filled in by the tests.
LOOP = """HloModule loop, is_scheduled=true

%condition (p.1: (s32[], s32[])) -> pred[] {{
  %p.1 = (s32[], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n.1 = s32[] get-tuple-element(%p.1), index=1
  ROOT %c.1 = pred[] compare(%i.1, %n.1), direction={direction}
}}

%body (p.2: (s32[], s32[])) -> (s32[], s32[]) {{
  %p.2 = (s32[], s32[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %n.2 = s32[] get-tuple-element(%p.2), index=1
  %step = s32[] constant({step})
  %next = s32[] {operation}(%i.2, %step), backend_config={{"estimated_cycles":"7"}}
  ROOT %t.2 = (s32[], s32[]) tuple(%next, %n.2)
}}

ENTRY %main (x: s32[]) -> s32[] {{
  %x = s32[] parameter(0)
  %init = s32[] constant({init})
  %limit = s32[] constant({limit})
  %t = (s32[], s32[]) tuple(%{start}, %limit)
  %loop = (s32[], s32[]) while(%t), condition=%condition, body=%body
  ROOT %r = s32[] get-tuple-element(%loop), index=0
}}
"""
USUAL = {"init": 0, "limit": 5, "step": 1, "operation": "add", "direction": "LT", "start": "init"}


def trips(**changes: object) -> tuple[int, list[str]]:
    walk = Walk(parse_module(LOOP.format(**{**USUAL, **changes})))
    return walk.root.children[0].times, walk.notices


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 5),
        ({"limit": 0}, 0),
        ({"init": -3}, 8),
        ({"step": 2}, 3),
        ({"direction": "LE"}, 6),
        ({"init": 9, "operation": "subtract", "direction": "GE", "limit": 0}, 10),
        ({"init": 1, "operation": "multiply", "step": 3, "limit": 81}, 4),
        ({"direction": "NE", "init": 2147483645, "limit": -2147483647}, 4),
    ],
)
def test_the_counter_is_run(changes: dict[str, object], count: int) -> None:
    assert trips(**changes) == (count, [])


def test_a_counter_of_two_words() -> None:
    assert [child.times for child in Walk(parse_module(STEP)).root.children] == [1, 3]


def test_the_carry_into_the_high_word() -> None:
    """From 2^32 - 2 to 2^32 + 1: the low word wraps, and the high word is compared as well."""
    text = STEP.replace(
        "%copy.272 = u32[]{:T(128)} copy(%constant.487)", "%copy.272 = u32[] constant(4294967294)"
    )
    text = text.replace("constant(3)", "constant(1)")
    text = text.replace("%constant.1061 = u32[]{:T(128)} constant(0)", "%constant.1061 = u32[] constant(1)")
    text = text.replace(
        "ROOT %or.24 = pred[]{:T(512)} or(%compare.131, %and.33)",
        "%below = pred[] compare(%get-tuple-element.1220, %constant.1061), direction=LT\n"
        "  ROOT %or.24 = pred[] or(%below, %and.33)",
    )
    walk = Walk(parse_module(text))
    assert walk.notices == [] and walk.root.children[1].times == 3


def test_a_loop_without_a_known_count_is_told() -> None:
    count, notices = trips(start="x")
    assert count == 1
    assert notices == [
        "the loop loop is counted once: its trip count is not known, it depends on parameter 0 of the program"
    ]


def test_a_loop_without_an_end_is_told() -> None:
    count, (notice,) = trips(step=0)
    assert count == 1 and "it never ends" in notice


def test_a_loop_inside_a_loop() -> None:
    """The inner limit is handed through the outer loop unchanged; the counts multiply."""
    text = LOOP.format(**USUAL)
    head, entry = text.split("ENTRY")
    head += """%outer_condition (p.3: (s32[], s32[])) -> pred[] {
  %p.3 = (s32[], s32[]) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %four = s32[] constant(4)
  ROOT %c.3 = pred[] compare(%i.3, %four), direction=LT
}

%outer_body (p.4: (s32[], s32[])) -> (s32[], s32[]) {
  %p.4 = (s32[], s32[]) parameter(0)
  %i.4 = s32[] get-tuple-element(%p.4), index=0
  %n.4 = s32[] get-tuple-element(%p.4), index=1
  %one = s32[] constant(1)
  %zero = s32[] constant(0)
  %t.4 = (s32[], s32[]) tuple(%zero, %n.4)
  %inner = (s32[], s32[]) while(%t.4), condition=%condition, body=%body
  %i.5 = s32[] add(%i.4, %one)
  %n.5 = s32[] get-tuple-element(%inner), index=1
  ROOT %t.5 = (s32[], s32[]) tuple(%i.5, %n.4)
}

"""
    entry = entry.replace("condition=%condition, body=%body", "condition=%outer_condition, body=%outer_body")
    walk = Walk(parse_module(head + "ENTRY" + entry))
    times = {visit.computation.name: visit.times for visit in walk.visits()}
    assert walk.notices == [] and times == {"main": 1, "outer_body": 4, "body": 20}
