"""Changes to a folder of tokenizer files that was copied from another: added tokens, a chat template.

The files are changed and not saved anew by transformers, which would write what it made of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tptrain.hf_files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from tptrain.untrusted import read_json

_TEMPLATE_FILE = "chat_template.jinja"
# Other places of templates, of which a reader may take one first.
_OTHER_TEMPLATES = ("chat_template.json", "additional_chat_templates")
_SETTING = "model.tokenizer"


def add_tokens(folder: Path, tokens: Mapping[str, int]) -> None:
    """Special tokens with their ids, where tokenizer.json lacks them; it is rewritten only then."""
    if not tokens:
        return
    path = folder / TOKENIZER_FILE
    content = read_json(path, _SETTING)
    known = {each["content"] for each in content.get("added_tokens") or ()}
    lacking = sorted((number, token) for token, number in tokens.items() if token not in known)
    if not lacking:
        return
    new = [{"id": number, **_special(token)} for number, token in lacking]
    # In the order of their ids, as the library writes them.
    together = [*(content.get("added_tokens") or ()), *new]
    _write(path, {**content, "added_tokens": sorted(together, key=lambda each: int(each["id"]))})
    config = _config(folder)
    if isinstance(config.get("added_tokens_decoder"), dict):
        beside = {str(number): _special(token) for number, token in lacking}
        config["added_tokens_decoder"] = {**config["added_tokens_decoder"], **beside}
        _write(folder / TOKENIZER_CONFIG_FILE, config)


def set_chat_template(folder: Path, text: str) -> None:
    """The one chat template of the folder, in the file where transformers 4.57 and 5 write it."""
    for name in _OTHER_TEMPLATES:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    config = _config(folder)
    if config.pop("chat_template", None) is not None:
        _write(folder / TOKENIZER_CONFIG_FILE, config)
    (folder / _TEMPLATE_FILE).write_text(text, encoding="utf-8")


def _special(token: str) -> dict[str, Any]:
    """As the library describes a token that is cut out of a text as it is written."""
    strips = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": token, **strips, "special": True}


def _config(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG_FILE
    return read_json(path, _SETTING) if path.exists() else {}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
