"""Chat templates for tokenizers that have none, and the tokens that they need.

No `{% generation %}`: transformers knows the block, other servers of the same folder do not. Both templates
begin and end the assistant's turn with what is a token by itself, so its mask is exact without.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tptrain.config.schema import ModelSection
from tptrain.errors import ProblemsError, refuse, unknown_name

OWN = "own"
_SETTING = "model.chat_template"
_SUFFIX = ".jinja"


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and the special tokens that it writes by name."""

    text: str
    tokens: tuple[str, ...] = ()


# Neither has words for tools: left out in silence, they would be missing from what is trained on.
_NO_TOOLS = "{% if tools %}{{ raise_exception('this chat template cannot tell of tools') }}{% endif %}"

CHAT_TEMPLATES = {
    "chatml": ChatTemplate(
        _NO_TOOLS + "{{ bos_token }}{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    # In words, for a tokenizer as it is: only EOS, which every one has, ends a turn.
    "turns": ChatTemplate(
        _NO_TOOLS + "{{ bos_token }}{% for message in messages %}"
        "{{ message['role'] | capitalize + ': ' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
}


def chosen_template(model: ModelSection) -> ChatTemplate | None:
    """The template that a recipe chooses; None for the tokenizer's own.

    Raises ProblemsError for a name that is none, and for a file that cannot be read.
    """
    chosen = model.chat_template
    if chosen == OWN:
        return None
    if chosen in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[chosen]
    if not chosen.endswith(_SUFFIX):
        names = (OWN, *CHAT_TEMPLATES, f"FILE{_SUFFIX}")
        raise ProblemsError([unknown_name(_SETTING, chosen, "chat template", names)])
    rule = "must be a file that can be read"
    fix = f"the path of a {_SUFFIX} file, or {', '.join(CHAT_TEMPLATES)}"
    try:
        text = Path(chosen).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise refuse(_SETTING, chosen, rule, error.strerror or str(error), fix) from error
    except UnicodeDecodeError as error:
        raise refuse(_SETTING, chosen, rule, "it is not UTF-8 text", fix) from error
    if not text.strip():
        raise refuse(_SETTING, chosen, "must say something", "the file is empty", fix)
    return ChatTemplate(text)


def asked_tokens(model: ModelSection) -> tuple[str, ...]:
    """The tokens that the tokenizer must have: those of the recipe, then those of its template."""
    template = chosen_template(model)
    return tuple(dict.fromkeys((*(model.add_tokens or ()), *(template.tokens if template else ()))))
