"""Finding and reading the config.json files that a recipe speaks of, on this machine only."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tptrain.config.schema import Recipe
from tptrain.errors import raise_if_any, refuse
from tptrain.untrusted import bounded_json, link_problems

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


def find_checkpoint_config(recipe: Recipe, environ: Mapping[str, str] = os.environ) -> dict[str, Any] | None:
    """The config.json of `model.pretrained`; None without a checkpoint or for a hub id not downloaded yet.

    A run that goes on needs its pretrained weights no more (but for those below adapters, of which reading
    them will tell): where they are gone, the run's own copy will do.
    Raises ProblemsError for a path that is not there, a folder without config.json, an unreadable file.
    """
    source = recipe.model.pretrained
    if source is None:
        return None
    folder = Path(source).expanduser()
    if folder.is_dir():
        return read_config(_config_in(folder, source), "model.pretrained", source)
    if folder.exists():
        raise refuse("model.pretrained", source, "must be a folder", "it is a file", _PASSING_FOLDER)
    is_hub_id = _HUB_ID.match(source) is not None
    found = cached_hub_file(source, "config.json", environ) if is_hub_id else None
    found = found or _config_of_saved_run(recipe)
    if found is None and not is_hub_id:
        raise refuse("model.pretrained", source, "must exist", f"no folder {folder}", _PASSING_FOLDER)
    return None if found is None else read_config(found, "model.pretrained", source)


def _config_of_saved_run(recipe: Recipe) -> Path | None:
    """The config.json that the run to go on with has kept, or None."""
    kept = Path(recipe.run_folder).expanduser() / "assets" / "config.json"
    return kept if recipe.resume != "never" and kept.is_file() else None


def config_is_on_the_hub_only(recipe: Recipe, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `model.pretrained` is a hub id whose config.json has not been downloaded yet."""
    return recipe.model.pretrained is not None and find_checkpoint_config(recipe, environ) is None


_PASSING_FOLDER = "a folder with config.json and safetensors files, a step RUN/checkpoints/STEP, or a hub id"


def read_config_file(recipe: Recipe) -> dict[str, Any] | None:
    """The fields of the config.json (or of the folder holding one) that `model.config` names as a path.

    None when `model.config` is no path. Raises ProblemsError when it cannot be read.
    """
    given = recipe.model.config
    if not isinstance(given, str) or given == "pretrained":
        return None
    path = Path(given).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        other = f"no file {path}"
        raise refuse("model.config", given, "must exist", other, "the path of a config.json, or pretrained")
    return read_config(path, "model.config", given)


def _config_in(folder: Path, source: str) -> Path:
    """Where a checkpoint folder keeps its config.json; a step of a run keeps it in the run's `assets`."""
    if (folder / "config.json").exists():
        raise_if_any(link_problems(folder, ["config.json"], "model.pretrained"))
        return folder / "config.json"
    if folder.parent.name == "checkpoints":
        assets = folder.parent.parent / "assets" / "config.json"
        if assets.exists():
            return assets
        other = f"no file {assets}"
        raise refuse("model.pretrained", source, "must be a step of a complete run", other, _PASSING_FOLDER)
    steps = folder / "checkpoints"
    other = f"it holds {_listing(folder)}"
    fix = f"a step in {steps}, or {folder / 'export'}" if steps.is_dir() else _PASSING_FOLDER
    raise refuse("model.pretrained", source, "must hold a config.json", other, fix)


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join([*names[:5], f"and {len(names) - 5} more"] if len(names) > 5 else names) or "nothing"


def read_config(path: Path, setting: str, value: str) -> dict[str, Any]:
    """A JSON object from a file. setting, value: what the user gave, for the problem if it cannot be read."""
    try:
        fields = bounded_json(path)
    except OSError as error:
        raise refuse(
            setting,
            value,
            "must be readable",
            f"{path}: {error.strerror or error}",
            "a file that you may read",
        ) from error
    except UnicodeDecodeError as error:
        raise refuse(setting, value, "must be JSON", f"{path}: not UTF-8 text", "a config.json") from error
    except json.JSONDecodeError as error:
        other = f"{path}, line {error.lineno}, column {error.colno}: {error.msg}"
        raise refuse(setting, value, "must be JSON", other, "a config.json that parses") from error
    except ValueError as error:
        rule, other = "must be JSON of a usual size", f"{path}: {error}"
        raise refuse(setting, value, rule, other, "a config.json") from error
    if not isinstance(fields, dict):
        other = f"{path} holds a JSON {type(fields).__name__}"
        raise refuse(setting, value, "must be a JSON object", other, '{"model_type": "llama", ...}')
    return fields


def cached_hub_file(repo: str, name: str, environ: Mapping[str, str]) -> Path | None:
    """A file of a hub repository's main revision in the local hub cache, or None.

    The layout is huggingface_hub's documented one; its own function costs 0.25 s of imports, which planning
    does not have.
    """
    cache = _hub_cache(environ) / f"models--{repo.replace('/', '--')}"
    reference = cache / "refs" / "main"
    if not reference.is_file():
        return None
    found = cache / "snapshots" / reference.read_text().strip() / name
    return found if found.is_file() else None


def _hub_cache(environ: Mapping[str, str]) -> Path:
    """$HF_HUB_CACHE, $HUGGINGFACE_HUB_CACHE, $HF_HOME/hub, or the same under the user's cache folder."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(variable):
            return Path(os.path.expandvars(environ[variable])).expanduser()
    user_cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{user_cache}/huggingface"
    return Path(os.path.expandvars(home)).expanduser() / "hub"
