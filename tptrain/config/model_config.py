"""Which config describes the model, and whether the recipe's own agrees with the checkpoint's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tptrain.config.schema import ModelSection
from tptrain.config.settings import shown
from tptrain.errors import Problem, ProblemsError, nearest
from tptrain.family import ModelFacts, facts_from_config

Config = Mapping[str, Any]

# Fields a recipe may carry that say nothing of the architecture's maths: token ids, formats, provenance.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PASSED_ON = (
    *_TOKEN_IDS,
    *("use_cache", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path"),
)
# Fields that the family reads besides those named like facts.
_READ = (
    *("model_type", "architectures", "hidden_act", "attention_dropout", "pretraining_tp"),
    *("rope_theta", "rope_scaling", "rope_parameters"),
)
_NOT_FIELDS = ("family", "rope", "layer_period")
_ROPE_FIELDS = {"kind": "rope_parameters.rope_type", "theta": "rope_theta"}


@dataclass(frozen=True)
class ConfigsAtHand:
    """The config.json files that could be read: the checkpoint's, and the one that `model.config` names."""

    checkpoint: Config | None = None
    file: Config | None = None


@dataclass(frozen=True)
class ChosenConfig:
    """The config that describes the model and the facts in it; both None when there are problems."""

    config: Config | None
    facts: ModelFacts | None
    problems: tuple[Problem, ...] = ()
    notices: tuple[str, ...] = ()


def choose_config(model: ModelSection, at_hand: ConfigsAtHand) -> ChosenConfig:
    """The config that describes the model: the recipe's own, compared with the checkpoint's when at hand."""
    if model.config == "pretrained":
        if at_hand.checkpoint is None:
            return ChosenConfig(None, None, (_no_config(model),))
        return _read(at_hand.checkpoint, f"config.json of {model.pretrained}")
    if isinstance(model.config, dict):
        chosen, unknown = _read(model.config, None), _unknown_fields(model.config)
    else:
        assert at_hand.file is not None, "the file that model.config names must be read before"
        chosen, unknown = _read(at_hand.file, model.config), []
    chosen = dataclasses.replace(chosen, problems=(*chosen.problems, *unknown))
    if model.pretrained is None or chosen.facts is None:
        return chosen
    if at_hand.checkpoint is None:
        notice = (
            f"model.pretrained={model.pretrained} is not on this machine: the recipe's architecture was not"
            " compared with its config.json."
        )
        return dataclasses.replace(chosen, notices=(notice,))
    return _compared(chosen, at_hand.checkpoint, str(model.pretrained))


def _no_config(model: ModelSection) -> Problem:
    if model.pretrained is None:
        rule, other = "needs a checkpoint to take the architecture from", "model.pretrained=none"
    else:
        rule = "needs the checkpoint's config.json at hand"
        other = f"model.pretrained={model.pretrained} is neither a local folder nor in the hub cache"
    fix = "the path of a config.json, its fields in the recipe, or model.pretrained=FOLDER"
    return Problem("model.config", "pretrained", rule, other, fix)


def _read(config: Config, origin: str | None) -> ChosenConfig:
    """Facts and problems of one config. origin: where it comes from, None for the recipe itself."""
    problems: tuple[Problem, ...] = ()
    facts = None
    try:
        facts = facts_from_config(config)
    except ProblemsError as error:
        problems = error.problems
    if config.get("quantization_config") is not None:
        problems += (_quantised(config["quantization_config"]),)
    if origin is not None:
        problems = tuple(dataclasses.replace(p, other=f"{p.other}; {origin}") for p in problems)
    return ChosenConfig(config, None if problems else facts, problems)


def _quantised(given: object) -> Problem:
    method = given.get("quant_method", "not named") if isinstance(given, Mapping) else given
    rule, other = "is not supported: weights must be plain numbers", f"quant_method: {method}"
    setting = "model.config.quantization_config"
    return Problem(setting, method, rule, other, "a checkpoint that is not quantised")


def _unknown_fields(config: Config) -> list[Problem]:
    """Fields of the recipe's own config that nothing would read, such as a misspelled one."""
    names = [field.name for field in dataclasses.fields(ModelFacts) if field.name not in _NOT_FIELDS]
    known = sorted([*names, *_READ, *_PASSED_ON])
    problems = []
    for field in config:
        if field not in known and field != "quantization_config":
            guess = nearest(field, known)
            fix = f"model.config.{guess} (did you mean it?)" if guess else "no such field"
            other = f"known: {', '.join(known)}"
            rule = "is not a field of this architecture"
            problems.append(Problem(f"model.config.{field}", config[field], rule, other, fix))
    return problems


def _compared(chosen: ChosenConfig, checkpoint: Config, source: str) -> ChosenConfig:
    """The recipe's config merged over the checkpoint's, or a problem for each fact that differs."""
    theirs = _read(checkpoint, f"config.json of {source}")
    if theirs.facts is None or chosen.facts is None or chosen.config is None:
        return ChosenConfig(None, None, (*chosen.problems, *theirs.problems))
    differences = fact_differences(chosen.facts, theirs.facts, chosen.config, source)
    if differences or chosen.problems:
        return ChosenConfig(None, chosen.facts, (*chosen.problems, *differences))
    merged = {**checkpoint, **chosen.config}
    notices = tuple(
        f"model.config.{field}={shown(merged[field])} replaces the checkpoint's {shown(checkpoint[field])}."
        for field in _TOKEN_IDS
        if field in checkpoint and merged[field] != checkpoint[field]
    )
    return ChosenConfig(merged, chosen.facts, (), notices)


def fact_differences(ours: ModelFacts, theirs: ModelFacts, given: Config, source: str) -> list[Problem]:
    """One problem per architecture fact in which the recipe and the checkpoint differ.

    given: the recipe's config, to tell what it says from what it leaves to a default.
    """
    mine, other = _by_field(ours), _by_field(theirs)
    problems = []
    for field in mine:
        if mine[field] != other[field]:
            value = shown(mine[field]) if _gives(given, field) else f"{shown(mine[field])} (not given)"
            passing = shown(other[field])
            fix = f"{passing}, or model.config=pretrained to take all of them"
            rule, compared = "must equal the checkpoint's", f"{source} has {field}={passing}"
            problems.append(Problem(f"model.config.{field}", value, rule, compared, fix))
    return problems


def _gives(config: Config, field: str) -> bool:
    """Whether a config says something of a field, in either spelling of RoPE."""
    top = field.partition(".")[0]
    if top.startswith("rope_"):
        return any(name in config for name in ("rope_parameters", "rope_scaling", "rope_theta"))
    return top in config


def _by_field(facts: ModelFacts) -> dict[str, object]:
    """Facts by the name that a config.json gives them."""
    plain = {f.name: getattr(facts, f.name) for f in dataclasses.fields(facts) if f.name not in _NOT_FIELDS}
    rope = {
        _ROPE_FIELDS.get(f.name, f"rope_parameters.{f.name}"): getattr(facts.rope, f.name)
        for f in dataclasses.fields(facts.rope)
    }
    return {"model_type": facts.family, **plain, **rope}
