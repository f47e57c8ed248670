"""SIGTERM: what a run does when the machine is taken away.

Python runs a signal handler in the main thread, between two bytecodes: not while XLA compiles, nor while a
step is waited for. So its number is written to a pipe the moment it arrives (`signal.set_wakeup_fd`), and a
thread reads it there. What happens then depends on how far the run is:

    STARTING   before the first step of this process: nothing is lost, the process exits at once
    TRAINING   the step or evaluation under way is finished and saved, and the main thread ends the run
    SAVED      the last step is saved, what follows can be done again: the process exits at once
    DONE       everything is written: the process ends by itself

A second SIGTERM ends the process at once in any case. This module imports no framework, so that the command
can watch from its beginning.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from enum import Enum
from types import FrameType, TracebackType
from typing import NoReturn, Protocol

# EX_TEMPFAIL of sysexits.h: nothing is lost, and the same command with resume=auto goes on.
PREEMPTED = 75
# What a shell reports of a process that SIGTERM has killed.
KILLED = 128 + signal.SIGTERM

# How long the last words may take before an exit: the console may be a pipe that nobody reads.
_LAST_WORDS_SECONDS = 0.5


class Preempted(Exception):
    """SIGTERM ended the run; its state is saved."""

    exit_code = PREEMPTED


class Stage(Enum):
    STARTING = "starting"
    TRAINING = "training"
    SAVED = "saved"
    DONE = "done"

    @property
    def ends_at_once(self) -> bool:
        return self in (Stage.STARTING, Stage.SAVED)


class EventLog(Protocol):
    """What is told of a preemption beside the console: the journal."""

    def event(self, event: str, phase: str, step: int) -> None: ...

    def open_if_there(self) -> None: ...


class Preemption:
    """Watches for SIGTERM inside its `with` block, and puts the old handler back behind it.

    watching: False where it cannot, because only the main thread of a process may install handlers.
    """

    def __init__(self) -> None:
        self.watching = False
        self._lock = threading.Lock()
        self._stage, self._step, self._doing = Stage.STARTING, 0, "step"
        self._asked = threading.Event()
        self._words: threading.Thread | None = None
        self._say: Callable[[str], None] = _print
        self._journal: EventLog | None = None

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.watching:
            self._restore()

    def tell(self, say: Callable[[str], None], journal: EventLog) -> None:
        """Where to announce what happens, from now on."""
        self._say, self._journal = say, journal

    def take_back(self) -> None:
        """Install the handler anew: call it after `jax.distributed.initialize`, which puts its own there."""
        if self.watching:
            signal.signal(signal.SIGTERM, _do_nothing)

    def start_from(self, step: int) -> None:
        """The step that the run starts from is known."""
        self._step = step

    def begin(self, step: int) -> bool:
        """Whether the run may begin a step, which a SIGTERM then has to be finished and saved.

        Does not return if the process is on its way out.
        """
        with self._lock:
            if self.asked:
                return False
            self._stage, self._step = Stage.TRAINING, step
            return True

    def doing(self, what: str) -> None:
        """What is done with the step that was begun last, in words for the console."""
        self._doing = what

    def saved(self) -> None:
        """The last step is published. Raises Preempted if SIGTERM has come."""
        with self._lock:
            self._stage = Stage.SAVED
            if self._asked.is_set():
                self.leave()

    @property
    def asked(self) -> bool:
        """Whether the run is to end as soon as its state is saved."""
        return self._asked.is_set()

    def done(self) -> None:
        """Everything is written; a SIGTERM changes nothing any more."""
        with self._lock:
            self._stage = Stage.DONE

    def leave(self) -> NoReturn:
        """End the run from the main thread, its state being saved."""
        if self._words is not None:
            self._words.join(_LAST_WORDS_SECONDS)
        self._say(f"Step {self._step} is saved. Exiting with {PREEMPTED}: resume=auto goes on from there.")
        self._event("end")
        raise Preempted

    def _install(self) -> None:
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._writer = writer
        # Without a handler in Python the C handler, which writes to the pipe, would not be there either.
        self._old_handler = signal.signal(signal.SIGTERM, _do_nothing)
        self._old_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)
        self._thread.start()
        self.watching = True

    def _restore(self) -> None:
        signal.set_wakeup_fd(self._old_fd)
        # None stands for a handler that was not installed from Python, which cannot be put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if self._old_handler is None else self._old_handler)
        os.close(self._writer)  # ends the thread
        self._thread.join()
        os.close(self._reader)
        self.watching = False

    def _watch(self) -> None:
        while numbers := os.read(self._reader, 64):
            for number in numbers:
                if number == signal.SIGTERM:
                    self._handle()

    def _handle(self) -> None:
        if self._asked.is_set():
            os._exit(KILLED)
        with self._lock:
            self._asked.set()
            last = self._stage.ends_at_once
            # In a thread of its own, so that a second signal is read whatever the console does.
            self._words = threading.Thread(target=self._announce, args=(self._intention(), last), daemon=True)
            self._words.start()
            if last:
                # The lock is kept, so that the main thread begins nothing that could be lost.
                self._words.join(_LAST_WORDS_SECONDS)
                os._exit(PREEMPTED)

    def _intention(self) -> str:
        """What happens now, in words."""
        if self._stage is Stage.TRAINING:
            return f"finishing {self._doing} {self._step}, then saving; a second SIGTERM exits at once"
        if self._stage is Stage.STARTING:
            return f"nothing to save, no step has been done since the start; exiting with {PREEMPTED}"
        if self._stage is Stage.SAVED:
            return f"step {self._step} is saved; exiting with {PREEMPTED}"
        return "everything is written, the run ends"

    def _announce(self, intention: str, last: bool) -> None:
        if last and self._journal is not None:
            self._journal.open_if_there()
        self._event("begin")
        self._say(f"SIGTERM: {intention}.")
        if last:
            self._event("end")
            sys.stdout.flush()
            sys.stderr.flush()

    def _event(self, event: str) -> None:
        if self._journal is not None:
            self._journal.event(event, "preempt", self._step)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """The handler in Python: the pipe has told the thread already."""


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")  # whole, whatever other threads print
    sys.stdout.flush()
