"""Chat templates in the manner of those that models ship with, and the same forms written in plain Python.

Each form is a Jinja template and, as an independent reference, a function that writes a conversation piece by
piece and says of each piece whether a model is to generate it and whose text it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Tools = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Piece:
    """A part of a written conversation. counted: the model is to generate it. role: "" where it is
    nobody's."""

    text: str
    role: str = ""
    counted: bool = False


@dataclass(frozen=True)
class ChatForm:
    """special: the tokens of the form. end: the one that ends a turn of the assistant's."""

    jinja: str
    pieces: Callable[[str, Sequence[Message], Tools], list[Piece]]
    special: tuple[str, ...]
    end: str | None
    system: bool = True
    tools: bool = False


def _joined(*parts: str) -> str:
    return "".join(parts)


# Llama 3's: headers, everything trimmed, BOS first.
_HEADERS = _joined(
    "{{ bos_token }}{% for m in messages %}",
    "<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\n\n' }}{{ m.content | trim }}<|eot_id|>",
    "{% endfor %}{% if add_generation_prompt %}",
    "<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{% endif %}",
)


def _headers(bos: str, messages: Sequence[Message], _: Tools) -> list[Piece]:
    pieces = [Piece(bos)]
    for m in messages:
        answers = m["role"] == "assistant"
        pieces.append(Piece(f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", m["role"]))
        pieces.append(Piece(f"{m['content'].strip()}<|eot_id|>", m["role"], answers))
    return pieces


# ChatML, and Qwen's variant of it with a system's turn of its own where the conversation has none.
_CHATML_TURNS = _joined(
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}",
    "{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}",
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}",
)
_DEFAULT_SYSTEM = "You answer in few words."
_CHATML_DEFAULT = _joined(
    "{% if messages[0].role != 'system' %}<|im_start|>system{{ '\n' }}",
    _DEFAULT_SYSTEM,
    "<|im_end|>{{ '\n' }}{% endif %}",
    _CHATML_TURNS,
)


def _chatml(_: str, messages: Sequence[Message], __: Tools) -> list[Piece]:
    pieces = []
    for m in messages:
        pieces.append(Piece(f"<|im_start|>{m['role']}\n", m["role"]))
        pieces.append(Piece(f"{m['content']}<|im_end|>", m["role"], m["role"] == "assistant"))
        pieces.append(Piece("\n", m["role"]))
    return pieces


def _chatml_default(bos: str, messages: Sequence[Message], tools: Tools) -> list[Piece]:
    written = _chatml(bos, messages, tools)
    if messages[0]["role"] == "system":
        return written
    # What the template says by itself stands in the first message's text.
    return [Piece(f"<|im_start|>system\n{_DEFAULT_SYSTEM}<|im_end|>\n", messages[0]["role"]), *written]


# Gemma's: turns of user and model, the system's words at the head of the first question.
_TURNS = _joined(
    "{{ bos_token }}{% if messages[0].role == 'system' %}",
    "{% set first = messages[0].content | trim + '\n\n' %}{% set rest = messages[1:] %}",
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}",
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}",
    "{{ raise_exception('roles must alternate') }}{% endif %}",
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}{{ '\n' }}",
    "{{ first if loop.first else '' }}{{ m.content | trim }}<end_of_turn>{{ '\n' }}{% endfor %}",
    "{% if add_generation_prompt %}<start_of_turn>model{{ '\n' }}{% endif %}",
)


def _turns(bos: str, messages: Sequence[Message], _: Tools) -> list[Piece]:
    pieces, first = [Piece(bos)], ""
    for m in messages:
        if m["role"] == "system":
            first = m["content"].strip() + "\n\n"
            continue
        name = "model" if m["role"] == "assistant" else "user"
        pieces.append(Piece(f"<start_of_turn>{name}\n{first if name == 'user' else ''}", m["role"]))
        pieces.append(Piece(f"{m['content'].strip()}<end_of_turn>", m["role"], name == "model"))
        pieces.append(Piece("\n", m["role"]))
        first = "" if name == "user" else first
    return pieces


# Mistral's: [INST] around questions, EOS behind answers, the system's words at the head of the last question.
_INST = _joined(
    "{{ bos_token }}{% if messages[0].role == 'system' %}",
    "{% set system = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}",
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}",
    "{% for m in rest %}{% if m.role == 'user' %}",
    "[INST]{{ ' ' }}{{ system if loop.first else '' }}{{ m.content }}[/INST]",
    "{% else %}{{ ' ' }}{{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}",
)


def _inst(bos: str, messages: Sequence[Message], _: Tools) -> list[Piece]:
    pieces, system = [Piece(bos)], ""
    for m in messages:
        if m["role"] == "system":
            system = m["content"] + "\n\n"
        elif m["role"] == "user":
            pieces.append(Piece(f"[INST] {system}{m['content']}[/INST]", "user"))
            system = ""
        else:
            pieces.append(Piece(f" {m['content'].strip()}</s>", "assistant", True))
    return pieces


# With tools, as Hermes and Qwen write them: described by the system, called in tags, answered in a user's
# turn.
_TOOLS = _joined(
    "{% if tools %}<|im_start|>system{{ '\n' }}",
    "{{ messages[0].content + '\n\n' if messages[0].role == 'system' else '' }}",
    "You may call:{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}<|im_end|>{{ '\n' }}",
    "{% elif messages[0].role == 'system' %}",
    "<|im_start|>system{{ '\n' }}{{ messages[0].content }}<|im_end|>{{ '\n' }}{% endif %}",
    "{% for m in messages %}{% if m.role == 'tool' %}",
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}",
    "{{ '\n' }}<tool_response>{{ '\n' }}{{ m.content }}{{ '\n' }}</tool_response>",
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>{{ '\n' }}{% endif %}",
    "{% elif m.role != 'system' %}<|im_start|>{{ m.role }}{{ '\n' }}{{ m.content }}",
    "{% for call in m.tool_calls or [] %}",
    "{{ '\n' if m.content or not loop.first else '' }}<tool_call>{{ '\n' }}",
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}',
    "{{ '\n' }}</tool_call>{% endfor %}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}",
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}",
)


def _tools(_: str, messages: Sequence[Message], tools: Tools) -> list[Piece]:
    head = messages[0]["content"] if messages[0]["role"] == "system" else ""
    role = messages[0]["role"]
    pieces = []
    if tools:
        described = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
        before = f"{head}\n\n" if head else ""
        pieces.append(Piece(f"<|im_start|>system\n{before}You may call:{described}<|im_end|>\n", role))
    elif head:
        pieces.append(Piece(f"<|im_start|>system\n{head}<|im_end|>\n", role))
    for at, m in enumerate(messages):
        around = [
            messages[at - 1]["role"] if at else "",
            "".join(n["role"] for n in messages[at + 1 : at + 2]),
        ]
        if m["role"] == "tool":
            begin = "" if around[0] == "tool" else "<|im_start|>user"
            end = "" if around[1] == "tool" else "<|im_end|>\n"
            pieces.append(Piece(f"{begin}\n<tool_response>\n{m['content']}\n</tool_response>{end}", "tool"))
        elif m["role"] != "system":
            said = m["content"]
            for call in m.get("tool_calls") or []:
                function = call["function"]
                arguments = json.dumps(function["arguments"], ensure_ascii=False)
                written = f'{{"name": "{function["name"]}", "arguments": {arguments}}}'
                said += ("\n" if said else "") + f"<tool_call>\n{written}\n</tool_call>"
            pieces.append(Piece(f"<|im_start|>{m['role']}\n", m["role"]))
            pieces.append(Piece(f"{said}<|im_end|>", m["role"], m["role"] == "assistant"))
            pieces.append(Piece("\n", m["role"]))
    return pieces


_IM = ("<|im_start|>", "<|im_end|>")
CHAT_FORMS = {
    "headers": ChatForm(
        _HEADERS, _headers, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"
    ),
    "chatml": ChatForm(_CHATML_TURNS, _chatml, _IM, "<|im_end|>"),
    "default_system": ChatForm(_CHATML_DEFAULT, _chatml_default, _IM, "<|im_end|>"),
    "turns": ChatForm(_TURNS, _turns, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "inst": ChatForm(_INST, _inst, ("[INST]", "[/INST]"), None),
    "tools": ChatForm(
        _TOOLS,
        _tools,
        (*_IM, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
        "<|im_end|>",
        tools=True,
    ),
}
