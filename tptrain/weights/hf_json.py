"""config.json and generation_config.json as Hugging Face readers of either major version understand them.

transformers 4 reads `rope_theta`, `rope_scaling` and `torch_dtype`; transformers 5 writes `rope_parameters`
and `dtype`. A reader that misses its own spelling falls back to defaults without a word, so both are given.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tptrain.errors import raise_if_any
from tptrain.family import read_config
from tptrain.untrusted import read_json as read_json

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class HasTokenIds(Protocol):
    """What is asked of a tokenizer here."""

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def pad_token_id(self) -> int | None: ...


def complete_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config.json of the model that `config` describes, stored in `dtype`, complete in both spellings.

    Fields that a reader would otherwise fill with its own defaults are written out. Fields that this package
    does not know are kept, but for `auto_map`, which names code files that no export holds.
    `transformers_version` stays as it was, because some readers treat tokenizer files by it; where it is
    missing, the installed version is written (transformers 4.57 warns without one).
    Raises ProblemsError as `facts_from_config` does.
    """
    read = read_config(config)
    raise_if_any(read.problems)
    done = {
        "architectures": [read.family.architecture],
        **config,
        **read.fields,
        "model_type": read.family.model_type,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    done.pop("auto_map", None)
    if done.get("transformers_version") is None:
        done["transformers_version"] = importlib.metadata.version("transformers")
    return done


def generation_config(
    source: Mapping[str, Any],
    own_ids: Mapping[str, Any],
    tokenizer: HasTokenIds | None,
    stops: Iterable[int] = (),
) -> dict[str, Any]:
    """The generation_config.json of a tuned model: the source's fields, with every token that ends an answer.

    source:    the generation_config.json of the checkpoint, {} without one; sampling fields are kept.
    own_ids:   where bos, eos and pad ids come from if `source` does not say: the checkpoint's config.json.
    tokenizer: adds its EOS to the stop tokens, and bos and pad where nothing else names them.
    stops:     further ids that end an answer, such as the end of a chat turn.

    `eos_token_id` is a list. The source's token ids must belong to the tokenizer: see `without_token_ids`.
    """
    ids = {name: source.get(name, own_ids.get(name)) for name in _TOKEN_IDS}
    eos = ids.pop("eos_token_id")
    ends = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id if tokenizer else None, *stops]
    for name, value in ids.items():
        ids[name] = getattr(tokenizer, name) if value is None and tokenizer else value
    # With this mark transformers 4 may build the file's content again from config.json.
    kept = {name: value for name, value in source.items() if name not in (*_TOKEN_IDS, "_from_model_config")}
    unique_ends = list(dict.fromkeys(end for end in ends if end is not None))
    named = {**ids, "eos_token_id": unique_ends or None}
    return kept | {name: value for name, value in named.items() if value is not None}


def without_token_ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without special token ids, for use with another tokenizer, where they mean other tokens."""
    return {name: value for name, value in fields.items() if name not in _TOKEN_IDS}


def with_token_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that names the same special tokens as the generation_config.json beside it."""
    ids = {name: generation[name] for name in _TOKEN_IDS if name in generation}
    ends = ids.get("eos_token_id")
    if isinstance(ends, list) and len(ends) == 1:
        ids["eos_token_id"] = ends[0]
    # A null keeps a reader from filling in its class's default id, which may be an ordinary token here.
    return {**config, **dict.fromkeys(_TOKEN_IDS), **ids}


def to_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_bytes(to_json(content))
