"""read_ahead: the same items in the same order, a bounded lead, errors where they belong, a clean end."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator

import pytest

from tptrain.weights.read_ahead import read_ahead


def wait_until_idle(made: list[int]) -> None:
    """Until nothing has been added for a while; a thread that may go on does so within microseconds."""
    before = -1
    while len(made) > before:
        before = len(made)
        time.sleep(0.1)


def numbers(
    made: list[int], end: BaseException | None = None, closed: list[str] | None = None
) -> Generator[int]:
    try:
        for number in range(50):
            made.append(number)
            yield number
        if end is not None:
            raise end
    finally:
        if closed is not None:
            closed.append(threading.current_thread().name)


def test_order_and_lead() -> None:
    made: list[int] = []
    items = read_ahead(numbers(made), 3)
    assert made == []
    for expected, item in enumerate(items):
        assert item == expected
        assert len(made) <= item + 1 + 3
        if item == 20:
            wait_until_idle(made)
            assert len(made) == 20 + 1 + 3
    assert made == list(range(50))


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt("boom"), SystemExit("boom")])
def test_an_error_comes_after_the_items_before_it(error: BaseException) -> None:
    seen: list[int] = []
    with pytest.raises(type(error), match="boom"):
        seen.extend(read_ahead(numbers([], error), 2))
    assert seen == list(range(50))


def test_closing_stops_the_thread_and_closes_the_items_there() -> None:
    made: list[int] = []
    closed: list[str] = []
    before = threading.active_count()
    items = read_ahead(numbers(made, closed=closed), 2)
    assert [next(items), next(items)] == [0, 1]
    assert threading.active_count() == before + 1
    items.close()
    assert threading.active_count() == before
    assert len(made) <= 4 and len(closed) == 1
    assert closed[0] != threading.current_thread().name


def test_one_inside_another_is_stopped_too() -> None:
    made: list[int] = []
    before = threading.active_count()

    def doubled() -> Generator[int]:
        for item in read_ahead(numbers(made), 2):
            yield 2 * item

    items = read_ahead(doubled(), 2)
    assert [next(items), next(items)] == [0, 2]
    items.close()
    assert threading.active_count() == before
    assert len(made) < 10
