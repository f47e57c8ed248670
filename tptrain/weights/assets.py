"""The files that travel with a run from its first step to its export: config, stop tokens, tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from tptrain.hf_files import (
    CONFIG_FILE,
    GENERATION_FILE,
    TOKENIZER_CONFIG_FILE,
    copy_tokenizer,
    require_tokenizer,
)
from tptrain.untrusted import read_json
from tptrain.weights.hf_json import (
    HasTokenIds,
    complete_config,
    generation_config,
    with_token_ids,
    without_token_ids,
    write_json,
)
from tptrain.weights.staging import staged_folder, writing
from tptrain.weights.tokenizer_files import add_tokens, set_chat_template


class Tokenizer(HasTokenIds, Protocol):
    """What is asked of a transformers tokenizer here."""

    def save_pretrained(self, folder: str, /) -> Any: ...


def collect_assets(
    out: str | Path,
    hf_config: Mapping[str, Any],
    tokenizer: Tokenizer,
    tokenizer_folder: Path | None = None,
    checkpoint_folder: Path | None = None,
    dtype: str = "float32",
    stops: Iterable[int] = (),
    added: Mapping[str, int] = MappingProxyType({}),
    chat_template: str | None = None,
) -> Path:
    """Make the folder `out` with config.json, generation_config.json and the tokenizer; returns its path.

    tokenizer:         the loaded tokenizer; its EOS becomes a stop token.
    tokenizer_folder:  where it was loaded from: its files are copied byte for byte. None for a tokenizer made
                       by this run, which is saved so that transformers 4 and 5 can both load it.
    checkpoint_folder: where the weights come from: its generation_config.json is kept. Its special token ids
                       count only when the tokenizer comes from the same folder.
    dtype:             what config.json says of the weights. stops: further ids that end an answer.
    added:             special tokens and their ids, which the copied files get where they lack them.
    chat_template:     in the place of those in the copied files; None: they keep theirs.

    The folder is complete or absent. Raises ProblemsError if `out` exists or cannot be written, or if
    `tokenizer_folder` holds no tokenizer.
    """
    out = Path(out).expanduser()
    if tokenizer_folder is not None:
        require_tokenizer(tokenizer_folder, "model.tokenizer")
    own_tokenizer = _same(tokenizer_folder, checkpoint_folder)
    source = _source_generation(checkpoint_folder)
    if not own_tokenizer:
        source = without_token_ids(source)
    generation = generation_config(source, hf_config if own_tokenizer else {}, tokenizer, stops)
    config = with_token_ids(complete_config(hf_config, dtype), generation)
    with staged_folder(out, "output_dir") as partial, writing(out, "output_dir"):
        write_json(partial / CONFIG_FILE, config)
        write_json(partial / GENERATION_FILE, generation)
        if tokenizer_folder is None:
            _save_tokenizer(tokenizer, partial)
        else:
            copy_tokenizer(tokenizer_folder, partial)
            add_tokens(partial, added)
            if chat_template is not None:
                set_chat_template(partial, chat_template)
    return out


def _same(one: Path | None, other: Path | None) -> bool:
    return one is not None and other is not None and one.resolve() == other.resolve()


def _source_generation(checkpoint_folder: Path | None) -> dict[str, Any]:
    path = checkpoint_folder / GENERATION_FILE if checkpoint_folder else None
    return read_json(path, "model.pretrained") if path and path.exists() else {}


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Save a tokenizer, and spell its config so that transformers 4 reads it as well.

    transformers 5 writes a class name and a list of extra special tokens that 4 does not know; it still reads
    both older spellings (seen with 5.23 and 4.57.6).
    """
    tokenizer.save_pretrained(str(folder))
    path = folder / TOKENIZER_CONFIG_FILE
    config = read_json(path, "model.tokenizer")
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(path, config)
