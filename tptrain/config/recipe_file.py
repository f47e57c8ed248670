"""Reading a recipe script: import it by path and take its RECIPE."""

from __future__ import annotations

import importlib.util
import linecache
import sys
import traceback
from pathlib import Path
from types import ModuleType

from pydantic import ValidationError

from tptrain.config.schema import Recipe
from tptrain.config.validation import validation_problems
from tptrain.errors import Problem, ProblemsError, nearest, refuse

_RECIPES_FOLDER = Path("recipes")


def load_recipe(name: str | Path) -> Recipe:
    """The `RECIPE` of a recipe script, given by path or, for a script in ./recipes, by name alone.

    Raises ProblemsError for a script that is not there, has no RECIPE, or stops with an error, which is named
    with the line of the script that it came from.
    """
    path = _find(str(name))
    module = _run(path, str(name))
    if not hasattr(module, "RECIPE"):
        capitals = [key for key, value in vars(module).items() if isinstance(value, Recipe)]
        other = f"recipes in it: {', '.join(capitals) or 'none'}"
        raise refuse("recipe", name, "must define RECIPE", other, "RECIPE = Recipe(...) at module level")
    if not isinstance(module.RECIPE, Recipe):
        other = f"RECIPE is a {type(module.RECIPE).__name__}"
        raise refuse("recipe", name, "must define RECIPE as a Recipe", other, "RECIPE = Recipe(...)")
    return module.RECIPE


def _find(name: str) -> Path:
    """The file that a path or the bare name of a recipe means."""
    path = Path(name)
    if path.is_file():
        return path
    by_name = _RECIPES_FOLDER / (name if name.endswith(".py") else f"{name}.py")
    if len(path.parts) == 1 and by_name.is_file():
        return by_name
    folder = path.parent if len(path.parts) > 1 else _RECIPES_FOLDER
    known = sorted(p.stem for p in folder.glob("*.py")) if folder.is_dir() else []
    rule = "is a folder, not a recipe script" if path.is_dir() else "is not a recipe script that exists"
    guess = nearest(path.stem, known)
    fix = f"{folder / guess}.py (did you mean it?)" if guess else "the path of a recipe script"
    raise refuse("recipe", name, rule, f"in {folder}: {', '.join(known) or 'no recipes'}", fix)


def _run(path: Path, name: str) -> ModuleType:
    """The module of a script, run with its own folder importable, as Python does for a main script."""
    spec = importlib.util.spec_from_file_location(f"tptrain_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise refuse("recipe", name, "must be a Python script", f"file {path}", "a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except ValidationError as error:
        raise ProblemsError(_located(validation_problems(error), _place(error, path))) from error
    except ProblemsError as error:
        raise ProblemsError(_located(error.problems, _place(error, path))) from error
    except (Exception, SystemExit) as error:
        raise _stopped(error, path, name) from error
    finally:
        sys.path.pop(0)
    return module


def _located(problems: list[Problem] | tuple[Problem, ...], place: str) -> list[Problem]:
    return [Problem(p.setting, p.value, p.rule, f"{p.other}; {place}", p.fix) for p in problems]


def _stopped(error: BaseException, path: Path, name: str) -> ProblemsError:
    """The error of a recipe that raised something of its own."""
    place = _place(error, path)
    source = _source_line(place)
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    other = f"{place}: {source}" if source else place
    fix = f"a script that runs; `python {path} --help` shows the whole traceback"
    return refuse("recipe", name, f"stopped with {message}", other, fix)


def _place(error: BaseException, path: Path) -> str:
    """`file:line` of the innermost frame in the recipe's own folder; else of the innermost frame."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    folder = path.resolve().parent
    own = [frame for frame in frames if folder in Path(frame.filename).resolve().parents]
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno}"


def _source_line(place: str) -> str:
    file, _, line = place.rpartition(":")
    return linecache.getline(file, int(line)).strip() if line.isdecimal() else ""
