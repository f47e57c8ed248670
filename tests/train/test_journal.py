"""The journal: whole lines from any thread, cut and mended, and read back as steps and events."""

import json
import resource
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest

from tptrain.train.journal import JOURNAL_FILE, Event, Journal, StepRecord, read_events, read_journal

RECORD = StepRecord(1, 2.5, 70, 90, 12, 0.3, 1e-3, 0.5, 0.2, 9.0, 1e-4, 1, 8, "ab12")


def record(step):
    return replace(RECORD, step=step, cursor=8 * step, loss=2.5 / step)


@pytest.fixture
def path(tmp_path):
    return tmp_path / JOURNAL_FILE


@pytest.fixture
def journal(tmp_path):
    made = Journal(tmp_path)
    yield made
    made.close()


def phases(path):
    return [(e.event, e.phase, e.step) for e in read_events(path)]


def test_steps_and_events_lie_side_by_side(journal, path):
    journal(record(1))
    with journal.phase("save", 1):
        journal(record(2))
    journal.event("end", "eval", 2, {"exact_match": 0.25})
    assert read_journal(path) == [record(1), record(2)]
    assert phases(path) == [("begin", "save", 1), ("end", "save", 1), ("end", "eval", 2)]
    last = read_events(path)[-1]
    assert last == Event("end", "eval", 2, last.time, {"exact_match": 0.25})
    keys = [list(json.loads(line)) for line in path.read_text().splitlines()]
    assert keys[1] == ["event", "phase", "step", "time"]


def test_a_phase_that_raises_has_ended(journal, path):
    with pytest.raises(ValueError, match="stop"), journal.phase("export", 3):
        raise ValueError("stop")
    assert phases(path) == [("begin", "export", 3), ("end", "export", 3)]


def test_a_phase_that_is_none_is_refused(journal):
    with pytest.raises(AssertionError):
        journal.event("begin", "lunch", 3)


def test_every_line_is_in_the_file_at_once(journal, path):
    journal(record(1))
    assert path.read_bytes().endswith(b"}\n") and len(read_journal(path)) == 1


def test_cut_drops_steps_and_events_of_later_steps(journal, path):
    for step in range(1, 6):
        journal(record(step))
        journal.event("begin", "save", step)
    journal.cut(3)
    journal(record(4))
    assert [r.step for r in read_journal(path)] == [1, 2, 3, 4]
    assert phases(path) == [("begin", "save", step) for step in (1, 2, 3)]


def test_a_line_cut_short_by_a_kill_does_not_run_into_the_next(tmp_path, path):
    first = Journal(tmp_path)
    first(record(1))
    first(record(2))
    first.close()
    whole = path.read_bytes()
    for cut in (1, 2, 40):
        path.write_bytes(whole[:-cut])
        second = Journal(tmp_path)
        second.event("begin", "start", 0)
        second(record(2))
        second.close()
        assert read_journal(path) == [record(1), record(2)], cut
        assert phases(path) == [("begin", "start", 0)], cut


def test_held_lines_leave_the_file_alone_until_it_is_opened(tmp_path, path):
    journal = Journal(tmp_path / "later", held=True)
    journal.event("begin", "start", 0)
    journal.open_if_there()
    assert not (tmp_path / "later").exists()
    (tmp_path / "later").mkdir()
    journal.open()
    journal(record(1))
    later = tmp_path / "later" / JOURNAL_FILE
    assert phases(later) == [("begin", "start", 0)] and read_journal(later) == [record(1)]
    journal.close()


def test_a_journal_that_is_there_is_appended_to(tmp_path, path, journal):
    journal(record(1))
    held = Journal(tmp_path, held=True)
    held.event("begin", "preempt", 1)
    held.open_if_there()
    held.close()
    assert read_journal(path) == [record(1)] and phases(path) == [("begin", "preempt", 1)]


def test_lines_of_many_threads_are_whole(journal, path):
    def write(thread):
        for step in range(200):
            journal.event("begin", "write", 1000 * thread + step)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for step in range(1, 201):
        journal(record(step))
    for thread in threads:
        thread.join()
    assert [r.step for r in read_journal(path)] == list(range(1, 201))
    steps = [e.step for e in read_events(path)]
    assert sorted(steps) == [1000 * thread + step for thread in range(4) for step in range(200)]
    for thread in range(4):
        own = [step for step in steps if step // 1000 == thread]
        assert own == sorted(own)


@contextmanager
def files_up_to(size):
    """No file of this process grows beyond `size` bytes: what a full disk does to an open file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_lines_that_a_full_disk_refuses_are_written_when_there_is_room(tmp_path, path):
    journal = Journal(tmp_path)
    journal(record(1))
    with files_up_to(path.stat().st_size + 30):
        journal(record(2))
        journal.event("begin", "save", 2)
        inside = path.read_bytes()
    assert read_journal(path) == [record(1)]
    assert inside.endswith(b"}\n"), "no part of a line may stay"
    journal(record(3))
    journal.close()
    assert read_journal(path) == [record(1), record(2), record(3)]
    assert phases(path) == [("begin", "save", 2)]
