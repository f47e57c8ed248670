"""Which families there are, and what the rest of the package asks of them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from tptrain.errors import Problem, raise_if_any, refuse, unknown_name
from tptrain.family import architectures
from tptrain.family.facts import ModelFacts
from tptrain.family.hf_config import ConfigReader
from tptrain.family.table import ParamRow


@dataclass(frozen=True)
class Family:
    """One model family: how its config is read and which parameters follow from it.

    model_type:   the value of `model_type` in its config.json.
    architecture: the class name that `config.json` may list under `architectures`.
    read_facts:   facts from a config as a dict; what the decoder would compute wrongly is a problem.
    """

    model_type: str
    architecture: str
    read_facts: Callable[[ConfigReader], ModelFacts]
    table: Callable[[ModelFacts], tuple[ParamRow, ...]]


@dataclass(frozen=True)
class ReadConfig:
    """What a config says.

    facts:    of the model; only right without problems.
    fields:   what was read by its Hugging Face name, as a config that leaves nothing to a default says it.
    asked:    names of all fields that this family looks for.
    problems: every field that is missing, has the wrong type, or asks for what this package does not compute.
    """

    family: Family
    facts: ModelFacts
    fields: Mapping[str, Any]
    asked: frozenset[str]
    problems: tuple[Problem, ...]


@cache
def families() -> Mapping[str, Family]:
    """model_type -> family, of every module in `tptrain.family.architectures`."""
    names = sorted(module.name for module in pkgutil.iter_modules(architectures.__path__))
    modules = [importlib.import_module(f"{architectures.__name__}.{name}") for name in names]
    return {module.FAMILY.model_type: module.FAMILY for module in modules}


def read_config(config: Mapping[str, Any]) -> ReadConfig:
    """The model that a Hugging Face config describes. Raises ProblemsError for an unknown `model_type`."""
    model_type = config.get("model_type")
    if model_type is None:
        known = ", ".join(families())
        raise refuse("model.config.model_type", None, "is required", f"known: {known}", "'llama'")
    if model_type not in families():
        raise_if_any([unknown_name("model.config.model_type", str(model_type), "model family", families())])
    family = families()[model_type]
    reader = ConfigReader(config)
    for architecture in reader.get("architectures") or ():
        if architecture != family.architecture:
            only = (family.architecture,)
            reader.problems.append(
                unknown_name("model.config.architectures", architecture, "architecture", only)
            )
    facts = family.read_facts(reader)
    asked = frozenset(reader.asked | {"model_type"})
    return ReadConfig(family, facts, reader.fields, asked, tuple(reader.problems))


def facts_from_config(config: Mapping[str, Any]) -> ModelFacts:
    """Facts of the model that a Hugging Face config describes.

    Raises ProblemsError for an unknown `model_type` or architecture and for every field that is missing,
    has the wrong type, or asks for something this package does not compute.
    """
    read = read_config(config)
    raise_if_any(read.problems)
    return read.facts


def parameter_table(facts: ModelFacts) -> tuple[ParamRow, ...]:
    """The parameter table of a model, unpadded."""
    return families()[facts.family].table(facts)
