"""Which families there are, and the two functions the rest of the package calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tptrain.errors import raise_if_any, refuse, unknown_name
from tptrain.family import llama
from tptrain.family.facts import ModelFacts
from tptrain.family.hf_config import ConfigReader
from tptrain.family.table import ParamRow


@dataclass(frozen=True)
class Family:
    """One model family: how its config is read and which parameters follow from it.

    architectures: the class names that `config.json` may list under `architectures`.
    model_type:    the value of `model_type` in its config.json.
    """

    model_type: str
    architectures: tuple[str, ...]
    read_facts: Callable[[ConfigReader], ModelFacts]
    table: Callable[[ModelFacts], tuple[ParamRow, ...]]


FAMILIES = {
    "llama": Family("llama", ("LlamaForCausalLM",), llama.read_facts, llama.table),
}


def facts_from_config(config: Mapping[str, Any]) -> ModelFacts:
    """Facts of the model that a Hugging Face config describes.

    Raises ProblemsError for an unknown `model_type` or architecture and for every field that is missing,
    has the wrong type, or asks for something this package does not compute.
    """
    model_type = config.get("model_type")
    if model_type is None:
        known = ", ".join(sorted(FAMILIES))
        raise refuse("model.config.model_type", None, "is required", f"known: {known}", "'llama'")
    if model_type not in FAMILIES:
        raise_if_any([unknown_name("model.config.model_type", str(model_type), "model family", FAMILIES)])
    family = FAMILIES[model_type]
    reader = ConfigReader(config)
    for architecture in config.get("architectures") or ():
        if architecture not in family.architectures:
            reader.problems.append(
                unknown_name("model.config.architectures", architecture, "architecture", family.architectures)
            )
    facts = family.read_facts(reader)
    raise_if_any(reader.problems)
    return facts


def parameter_table(facts: ModelFacts) -> tuple[ParamRow, ...]:
    """The parameter table of a model, unpadded."""
    return FAMILIES[facts.family].table(facts)
