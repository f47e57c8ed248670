"""Who is told about every step beside the journal: the progress bar and TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tptrain.train.journal import StepRecord

Observer = Callable[[StepRecord], None]


class ProgressBar:
    """Loss, tokens per second and time left, on the terminal."""

    def __init__(self, console: Console, total_steps: int, done_steps: int):
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=done_steps, loss="-", speed="-")
        self._progress.start()

    def __call__(self, record: StepRecord) -> None:
        speed = f"{record.tokens_per_second:,.0f}"
        self._progress.update(self._task, completed=record.step, loss=f"{record.loss:.4f}", speed=speed)

    def close(self) -> None:
        self._progress.stop()


class LogLines:
    """A plain line every so many steps, where the output is no terminal."""

    def __init__(self, console: Console, total_steps: int):
        self._console, self._total = console, total_steps
        self._every = max(total_steps // 20, 1)

    def __call__(self, record: StepRecord) -> None:
        if record.step % self._every == 0 or record.step in (1, self._total):
            self._console.print(
                f"step {record.step}/{self._total}: loss {record.loss:.4f}, "
                f"{record.tokens_per_second:,.0f} tokens/s",
                highlight=False,
            )

    def close(self) -> None:
        pass


class SkippedLines:
    """A line for every step that was skipped."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say

    def __call__(self, record: StepRecord) -> None:
        if record.skipped:
            self._say(
                f"Step {record.step} is skipped ({record.skipped}): loss {record.loss:.4g}, gradient norm"
                f" {record.grad_norm:.4g}. Its update is left out."
            )


class TensorBoard:
    """Event files in `RUN/tensorboard`."""

    def __init__(self, run_folder: Path, done_steps: int):
        """done_steps: what an earlier process has written after this step is dropped."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_folder / "tensorboard"), purge_step=done_steps + 1)

    def __call__(self, record: StepRecord) -> None:
        for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "step_seconds"):
            self._writer.add_scalar(f"train/{name}", getattr(record, name), record.step)

    def close(self) -> None:
        self._writer.close()
