"""Which config describes the model, and whether the recipe's own agrees with the checkpoint's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tptrain.config.schema import ModelSection
from tptrain.config.settings import shown
from tptrain.errors import Problem, ProblemsError, nearest
from tptrain.family import ModelFacts, ReadConfig, read_config

Config = Mapping[str, Any]

# Fields a recipe may carry that say nothing of the architecture's maths: token ids, formats, provenance.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PASSED_ON = (
    *_TOKEN_IDS,
    *("use_cache", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path"),
)
# Old spellings of what `rope_parameters` says.
_OLD_SPELLINGS = ("rope_scaling", "rope_local_base_freq")


@dataclass(frozen=True)
class ConfigsAtHand:
    """The config.json files that could be read: the checkpoint's, and the one that `model.config` names.

    num_ids: how many ids the tokenizer comes to with the tokens that the recipe adds; 0 where it adds none.
    """

    checkpoint: Config | None = None
    file: Config | None = None
    num_ids: int = 0


@dataclass(frozen=True)
class ChosenConfig:
    """The config that describes the model and the facts in it; both None when there are problems.

    read: what the family found in the config; None for an unknown family.
    new_rows: of the vocabulary, beyond those of the checkpoint.
    """

    config: Config | None
    facts: ModelFacts | None
    problems: tuple[Problem, ...] = ()
    notices: tuple[str, ...] = ()
    read: ReadConfig | None = None
    new_rows: int = 0


def choose_config(model: ModelSection, at_hand: ConfigsAtHand) -> ChosenConfig:
    """The config that describes the model: the recipe's own, compared with the checkpoint's when at hand.

    Its vocabulary has room for the tokens that the recipe adds.
    """
    return _with_room(_described(model, at_hand), model, at_hand.num_ids)


def _with_room(chosen: ChosenConfig, model: ModelSection, num_ids: int) -> ChosenConfig:
    """The config with as many rows as there are ids, where it has fewer."""
    if chosen.facts is None or chosen.config is None or num_ids <= chosen.facts.vocab_size:
        return chosen
    held = chosen.facts.vocab_size
    has_weights = model.pretrained is not None
    begin = "the new rows begin as the mean of the others" if has_weights else "all begin at random"
    notice = f"The vocabulary grows from {held:,} to {num_ids:,} rows for the added tokens; {begin}."
    return dataclasses.replace(
        chosen,
        config={**chosen.config, "vocab_size": num_ids},
        facts=dataclasses.replace(chosen.facts, vocab_size=num_ids),
        notices=(*chosen.notices, notice),
        new_rows=num_ids - held if has_weights else 0,
    )


def _described(model: ModelSection, at_hand: ConfigsAtHand) -> ChosenConfig:
    if model.config == "pretrained":
        if at_hand.checkpoint is None:
            return ChosenConfig(None, None, (_no_config(model),))
        return _read(at_hand.checkpoint, f"config.json of {model.pretrained}")
    if isinstance(model.config, dict):
        chosen = _read(model.config, None)
        unknown = _unknown_fields(model.config, chosen.read) if chosen.read else []
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
    read: ReadConfig | None = None
    try:
        read = read_config(config)
        problems = read.problems
    except ProblemsError as error:
        problems = error.problems
    if config.get("quantization_config") is not None:
        problems += (_quantised(config["quantization_config"]),)
    if origin is not None:
        problems = tuple(dataclasses.replace(p, other=f"{p.other}; {origin}") for p in problems)
    return ChosenConfig(config, read.facts if read and not problems else None, problems, read=read)


def _quantised(given: object) -> Problem:
    method = given.get("quant_method", "not named") if isinstance(given, Mapping) else given
    rule, other = "is not supported: weights must be plain numbers", f"quant_method: {method}"
    setting = "model.config.quantization_config"
    return Problem(setting, method, rule, other, "a checkpoint that is not quantised")


def _unknown_fields(config: Config, read: ReadConfig) -> list[Problem]:
    """Fields of the recipe's own config that nothing would read, such as a misspelled one."""
    known = sorted({*read.asked, *_PASSED_ON})
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
    assert chosen.read is not None and theirs.read is not None
    differences = field_differences(chosen.read, theirs.read, chosen.config, source)
    if differences or chosen.problems:
        return ChosenConfig(None, chosen.facts, (*chosen.problems, *differences))
    merged = {**checkpoint, **chosen.config}
    notices = tuple(
        f"model.config.{field}={shown(merged[field])} replaces the checkpoint's {shown(checkpoint[field])}."
        for field in _TOKEN_IDS
        if field in checkpoint and merged[field] != checkpoint[field]
    )
    return ChosenConfig(merged, chosen.facts, (), notices)


def field_differences(ours: ReadConfig, theirs: ReadConfig, given: Config, source: str) -> list[Problem]:
    """One problem per field in which the recipe and the checkpoint describe different models.

    given: the recipe's config, to tell what it says from what it leaves to a default.
    """
    mine, other = described(ours), described(theirs)
    problems = []
    for name in sorted({*mine, *other}):
        if mine.get(name) != other.get(name):
            value = shown(mine.get(name)) if _gives(given, name) else f"{shown(mine.get(name))} (not given)"
            passing = shown(other.get(name))
            fix = f"{passing}, or model.config=pretrained to take all of them"
            rule, compared = "must equal the checkpoint's", f"{source} has {name}={passing}"
            problems.append(Problem(f"model.config.{name}", value, rule, compared, fix))
    return problems


def _gives(config: Config, name: str) -> bool:
    """Whether a config says something of a field, in either spelling of RoPE."""
    top = name.partition(".")[0]
    if top.startswith("rope_"):
        return any(name in config for name in ("rope_parameters", "rope_scaling", "rope_theta"))
    return top in config


def described(read: ReadConfig) -> dict[str, object]:
    """What makes a model the one it is, field by field: `rope_parameters.factor` is one of them."""
    fields = {"model_type": read.family.model_type, **read.fields}
    leaves = dict(_leaves({name: value for name, value in fields.items() if name not in _OLD_SPELLINGS}))
    # One theta is told under the name that most configs use, several by the layers they are for.
    has_one = leaves.pop("rope_parameters.rope_theta", None) is not None
    return leaves if has_one else {name: value for name, value in leaves.items() if name != "rope_theta"}


def _leaves(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
