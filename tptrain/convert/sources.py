"""What a path or hub id on the command line stands for: a step of a run, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tptrain.ckpt.steps import find_step, is_step_folder
from tptrain.errors import Problem, refuse
from tptrain.hf_files import CONFIG_FILE, CONFIG_FILES, TOKENIZER_FILES, WEIGHT_FILES, local_folder

_ALL_FILES = (*CONFIG_FILES, *WEIGHT_FILES, *TOKENIZER_FILES)
_WHICH = "--from-step"


@dataclass(frozen=True)
class Found:
    """A folder that holds a model. is_step: whether as a checkpoint step, else as Hugging Face files."""

    folder: Path
    is_step: bool


def find_model(given: str, setting: str, which: str | None = None) -> Found:
    """The step or the Hugging Face folder that `given` means.

    given: a step, a run or its `checkpoints`, a folder with config.json and safetensors, or a hub id, whose
           files are downloaded. which: for a run, "latest" (also None), "best" or the number of a step.
    Raises ProblemsError when it is none of these, or when `which` has nothing to choose from.
    """
    path = Path(given).expanduser()
    if is_step_folder(path):
        if which is not None:
            run = path.absolute().parent.parent
            rule, other = "needs a run to choose a step of", f"{setting}={given} is one step"
            raise refuse(_WHICH, which, rule, other, f"{setting}={run}, or no {_WHICH}")
        return Found(path, is_step=True)
    if path.is_dir() and not (path / CONFIG_FILE).exists():
        if not _may_have_steps(path):
            rule = "must be a step, a run, or a folder with config.json and safetensors"
            other = f"it holds {_listing(path)}"
            raise refuse(setting, given, rule, other, "RUN, RUN/checkpoints/STEP, a model folder or a hub id")
        return Found(find_step(path, setting, which or "latest"), is_step=True)
    if which is not None:
        rule, other = "needs a run to choose a step of", f"{setting}={given} is a model, not a run"
        raise refuse(_WHICH, which, rule, other, f"no {_WHICH}")
    return Found(local_folder(given, setting, _ALL_FILES), is_step=False)


def _may_have_steps(path: Path) -> bool:
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    return folder != path or any(child.name.isdecimal() for child in folder.iterdir())


def _listing(folder: Path, most: int = 5) -> str:
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def place_problems(out: Path, sources: Sequence[Path], overwrite: bool) -> list[Problem]:
    """Why `out` must not be written: it would change a step, or replace a folder that it is made from."""
    place = out.resolve()
    inside = next((folder for folder in place.parents if is_step_folder(folder)), None)
    if inside is not None:
        other = f"{inside} is a step: a file more in it would make it a damaged one"
        return [Problem("OUT", out, "must lie outside of every checkpoint step", other, "another path")]
    held = [source for source in sources if source.resolve().is_relative_to(place)]
    if overwrite and held:
        rule, other = "must not be replaced by what is read from it", f"it holds {held[0]}"
        return [Problem("OUT", out, rule, other, "another path")]
    return []
