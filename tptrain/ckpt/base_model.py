"""The model below adapters: a step holds the adapters alone, so it is found again and recognised.

The `run` item of a step says where the model was, and fingerprints of its files, under `base`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from tptrain.backends.base import TensorSource
from tptrain.ckpt.digests import MANIFEST
from tptrain.ckpt.reading import StepReader
from tptrain.ckpt.steps import is_step_folder
from tptrain.config.plan import Plan
from tptrain.errors import Problem, raise_if_any
from tptrain.family import ParamRow
from tptrain.hf_files import WEIGHT_FILES, local_folder
from tptrain.jaxside.random_init import RandomSource
from tptrain.weights import SafetensorsSource
from tptrain.weights.fingerprint import weight_fingerprints


@dataclass(frozen=True)
class BaseModel:
    """Where the weights below adapters come from.

    pretrained:   a model folder or a step, as an absolute path, or a hub id; None: made from `seed`, with the
                  spread `initializer_range`.
    fingerprints: file name -> what tells whether it is the same file.
    """

    pretrained: str | None
    seed: int
    initializer_range: float
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def base_model(plan: Plan) -> BaseModel | None:
    """The model that the plan's adapters stand on, as it is now; None for a plan without adapters."""
    recipe = plan.recipe
    if not recipe.lora.rank:
        return None
    return located(recipe.model.pretrained, recipe.seed, plan.facts.initializer_range, "model.pretrained")


def located(pretrained: str | None, seed: int, initializer_range: float, setting: str) -> BaseModel:
    """The same for a folder or hub id. setting: where the user gave it."""
    if pretrained is None:
        return BaseModel(None, seed, initializer_range)
    path = Path(pretrained).expanduser()
    name = str(path.absolute()) if path.is_dir() else pretrained
    return BaseModel(name, seed, initializer_range, _fingerprints(pretrained, setting))


def _fingerprints(pretrained: str, setting: str) -> dict[str, str]:
    """Of the weights' files; of a step of its manifest, which has the digests of all its files."""
    path = Path(pretrained).expanduser()
    if not is_step_folder(path):
        return weight_fingerprints(local_folder(pretrained, setting, WEIGHT_FILES), setting)
    manifest = path / MANIFEST
    return {MANIFEST: xxhash.xxh3_128_hexdigest(manifest.read_bytes())} if manifest.exists() else {}


def base_problems(base: BaseModel, saved: Mapping[str, Any], setting: str) -> list[Problem]:
    """Why adapters must not be put on this model. saved: `base` of the step that holds them."""
    before, now = saved["fingerprints"], base.fingerprints
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if not changed and (base.pretrained is None) == (saved["pretrained"] is None):
        return []
    rule = "must be the model that the adapters were trained on"
    other = f"other than it was: {', '.join(changed) or 'everything'}"
    fix = f"the weights that {saved['pretrained'] or 'random initialisation'} stood for"
    return [Problem(setting, base.pretrained or "none", rule, other, fix)]


def open_base(base: BaseModel, table: tuple[ParamRow, ...], setting: str) -> TensorSource:
    """The weights of the model. table: its rows. Raises ProblemsError when they are not there."""
    if base.pretrained is None:
        return RandomSource(base.seed, base.initializer_range)
    path = Path(base.pretrained)
    if is_step_folder(path):
        return StepReader(path, setting, unverified=not base.fingerprints)
    return SafetensorsSource(base.pretrained, table, setting)


def saved_base(run: Mapping[str, Any], given: str | None, setting: str) -> BaseModel:
    """The model below the adapters of a step: where `given` says, else where it was when they were trained.

    run: the JSON item of the step. Raises ProblemsError when it is not there, or is another one.
    """
    saved = run["base"]
    pretrained = given or saved["pretrained"]
    found = located(pretrained, saved["seed"], saved["initializer_range"], setting)
    raise_if_any(base_problems(found, saved, setting))
    return found
