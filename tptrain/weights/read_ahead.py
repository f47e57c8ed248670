"""Running a generator in a thread of its own, a few items ahead of whoever uses them."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _End:
    """What follows the last item; error: what ended the generator early, if anything did."""

    error: BaseException | None


def read_ahead(items: Generator[T], ahead: int) -> Generator[T]:
    """The items in order, made by one thread that is at most `ahead` items in front.

    Whatever `items` raises is raised here, after the items before it. Closing this generator stops the thread
    before its next item, closes `items` there and waits for both; until it is closed or used up, the thread
    may be waiting, so use it inside `contextlib.closing`.
    """
    ready: SimpleQueue[T | _End] = SimpleQueue()
    room, stop = threading.Semaphore(ahead), threading.Event()
    thread = threading.Thread(target=_fill, args=(items, ready, room, stop), daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            room.release()
            yield item
            del item  # or it would stay in memory while the next one is waited for
    finally:
        stop.set()
        room.release()
        thread.join()
    if item.error is not None:
        raise item.error


def _fill(
    items: Generator[T], ready: SimpleQueue[T | _End], room: threading.Semaphore, stop: threading.Event
) -> None:
    error = None
    try:
        with closing(items):
            room.acquire()
            for item in items:
                ready.put(item)
                del item
                room.acquire()
                if stop.is_set():
                    break
    except BaseException as caught:  # raised again where the items are used
        error = caught
    ready.put(_End(error))
