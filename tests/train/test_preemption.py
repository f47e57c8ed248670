"""SIGTERM inside one process: what the watch does at each stage, and a run that it ends."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from rich.console import Console

from tests.train.steps import assert_same_state, journal_values, published
from tptrain.config import EvalSection, ExportSection, LogSection, SaveSection, ScheduleSection
from tptrain.config.planning import plan_recipe
from tptrain.train.journal import Journal, read_events
from tptrain.train.preemption import Preempted, Preemption
from tptrain.train.run import train

ROOT = Path(__file__).resolve().parents[2]
NO_EXPORT = ExportSection(enabled=False)


def script(body):
    """Runs code inside a Preemption called `watch`; returns its exit code and its lines."""
    code = (
        "import hashlib, os, signal\n"
        "from tptrain.train.preemption import Preemption\n"
        "def terminate(): os.kill(os.getpid(), signal.SIGTERM)\n"
        # As a compiler does: the GIL is free, but the main thread runs no bytecode, and so no handler.
        "def busy(): hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
        "with Preemption() as watch:\n" + textwrap.indent(textwrap.dedent(body), "    ")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def test_before_the_first_step_it_exits_at_once_while_the_main_thread_is_busy():
    code, lines = script("terminate(); busy()")
    assert code == 75
    assert lines == ["SIGTERM: nothing to save, no step has been done since the start; exiting with 75."]


def test_a_step_under_way_is_left_to_the_main_thread():
    code, lines = script(
        """
        watch.begin(7)
        terminate()
        while not watch.asked: pass
        try:
            watch.saved()
        except Exception as error:
            print(type(error).__name__, error.exit_code)
        """
    )
    assert code == 0
    assert lines == [
        "SIGTERM: finishing step 7, then saving; a second SIGTERM exits at once.",
        "Step 7 is saved. Exiting with 75: resume=auto goes on from there.",
        "Preempted 75",
    ]


def test_a_second_one_exits_at_once():
    code, _ = script("watch.begin(7); terminate()\nwhile not watch.asked: pass\nterminate(); busy()")
    assert code == 143


def test_a_run_that_was_to_go_on_has_it_in_its_journal(tmp_path):
    """Its journal is not open yet, but it is there; a new run has none, and gets none."""
    body = """
    from pathlib import Path
    from tptrain.train.journal import Journal
    journal = Journal(Path({folder!r}), held=True)
    journal.event("begin", "start", 0)
    watch.tell(print, journal)
    terminate(); busy()
    """
    (tmp_path / "old").mkdir()
    Journal(tmp_path / "old").close()
    for name in ("old", "new"):
        assert script(body.format(folder=str(tmp_path / name)))[0] == 75
    phases = [(e.event, e.phase) for e in read_events(tmp_path / "old" / "journal.jsonl")]
    assert phases == [("begin", "start"), ("begin", "preempt"), ("end", "preempt")]
    assert not (tmp_path / "new").exists()


def test_no_step_begins_after_it():
    code, lines = script(
        """
        assert watch.begin(7)
        terminate()
        while not watch.asked: pass
        assert not watch.begin(8)
        try: watch.leave()
        except Exception: pass
        """
    )
    assert code == 0 and lines[-1].startswith("Step 7 is saved.")


def test_the_handler_that_jax_installs_for_several_hosts_is_replaced():
    """Without `take_back` XLA's own handler would swallow the signal."""
    code, lines = script(
        """
        import socket, jax
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        jax.config.update("jax_platforms", "cpu")
        jax.distributed.initialize(f"localhost:{port}", 1, 0)
        watch.take_back()
        terminate(); busy()
        """
    )
    assert code == 75
    assert any(line.startswith("SIGTERM: nothing to save") for line in lines)


def test_after_the_last_save_it_exits_at_once():
    code, lines = script("watch.begin(7); watch.saved(); terminate(); busy()")
    assert (code, lines) == (75, ["SIGTERM: step 7 is saved; exiting with 75."])


def test_when_everything_is_written_the_run_ends_by_itself():
    code, lines = script("watch.begin(7); watch.saved(); watch.done(); terminate()\nprint('the end')")
    # The watcher's thread prints beside the main one.
    assert code == 0 and "the end" in "".join(lines)


def test_a_console_that_nobody_reads_does_not_keep_it():
    """The pipe to stdout is full, so that a line would wait for ever."""
    code = """
import hashlib, os, signal
from tptrain.train.preemption import Preemption
with Preemption():
    os.set_blocking(1, False)
    try:
        while True:
            os.write(1, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(1, True)
    os.kill(os.getpid(), signal.SIGTERM)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.wait(timeout=60) == 75
    process.stdout.close()


def test_the_old_handler_and_wakeup_fd_come_back():
    before = signal.getsignal(signal.SIGTERM)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threads = threading.active_count()
    old_fd = signal.set_wakeup_fd(writer)
    try:
        with Preemption() as watch:
            assert watch.watching and signal.getsignal(signal.SIGTERM) is not before
        assert not watch.watching
        assert signal.getsignal(signal.SIGTERM) is before
        assert threading.active_count() == threads
    finally:
        assert signal.set_wakeup_fd(old_fd) == writer
        os.close(reader)
        os.close(writer)


def test_sigint_stays_what_it_was():
    # A shell starts what it puts into the background with SIGINT ignored.
    shell_set = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGINT)
    with Preemption():
        assert signal.getsignal(signal.SIGINT) is before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, shell_set)


class Terminating:
    """A console's file that sends SIGTERM to this process at a text, and waits until it is seen."""

    def __init__(self, text, run):
        self._text, self._run, self.written = text, run, []

    def write(self, text):
        self.written.append(text)
        if self._text in text:
            os.kill(os.getpid(), signal.SIGTERM)
            while not preemptions(self._run):
                pass

    def flush(self):
        pass

    def isatty(self):
        return False

    @property
    def lines(self):
        return "".join(self.written).splitlines()


@pytest.fixture
def ended(recipe, tmp_path):
    """Trains until a text is written and SIGTERM comes; returns the lines on the console."""

    def run(text, **changes):
        file = Terminating(text, tmp_path / "run")
        plan = plan_recipe(
            recipe(export=NO_EXPORT, log=LogSection(progress=True, tensorboard=False), **changes)
        )
        with pytest.raises(Preempted):
            train(plan, Console(file=file, width=300, highlight=False, markup=False))
        return file.lines

    return run


def preemptions(run):
    return [(e.event, e.step) for e in read_events(run / "journal.jsonl") if e.phase == "preempt"]


def test_the_step_is_finished_and_saved_and_the_run_goes_on_bit_for_bit(recipe, ended, tmp_path):
    settings = {"schedule": ScheduleSection(max_steps=9), "save": SaveSection(every_steps=4, keep_last=9)}
    lines = ended("step 3/9", **settings)
    run = tmp_path / "run"
    assert published(run) == [3]
    assert "SIGTERM: finishing step 3, then saving; a second SIGTERM exits at once." in lines
    assert lines[-1] == "Step 3 is saved. Exiting with 75: resume=auto goes on from there."
    assert preemptions(run) == [("begin", 3), ("end", 3)]
    train(plan_recipe(recipe(export=NO_EXPORT, resume="auto", **settings)))
    straight = tmp_path / "straight"
    train(plan_recipe(recipe(export=NO_EXPORT, output_dir=str(straight), **settings)))
    assert journal_values(run) == journal_values(straight)
    plan = plan_recipe(recipe(output_dir="elsewhere"))
    assert_same_state(plan, run / "checkpoints" / "9", straight / "checkpoints" / "9")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_evaluation_is_finished_and_its_step_saved(recipe, records, ended, tmp_path):
    section = EvalSection(problems=5, path=str(records), max_new_tokens=6, batch_rows=5, every_steps=2)
    save = SaveSection(every_steps=0)
    lines = ended("right after step 2", eval=section, save=save, schedule=ScheduleSection(max_steps=9))
    assert published(tmp_path / "run") == [2]
    doing = "finishing the evaluation of step 2, then saving"
    assert f"SIGTERM: {doing}; a second SIGTERM exits at once." in lines


def test_the_last_step_needs_no_second_save(recipe, ended, tmp_path):
    lines = ended("step 4/4")
    assert "Step 4 is saved. Exiting with 75: resume=auto goes on from there." in lines
    assert published(tmp_path / "run") == [2, 4]
    result = train(plan_recipe(recipe(resume="auto")))
    assert result.export_dir.is_dir()


def test_outside_the_main_thread_a_run_goes_unwatched_and_says_so(recipe, tmp_path, capsys):
    plan = plan_recipe(recipe(export=NO_EXPORT))
    thread = threading.Thread(target=train, args=(plan,))
    thread.start()
    thread.join()
    assert published(tmp_path / "run") == [2, 4]
    assert "Note: only the main thread of a process can watch for SIGTERM" in capsys.readouterr().out
