"""A record to what it says: a prompt and a completion, or a conversation; or the reason why it says neither.

A preset names the columns and the form. Nothing is tokenised here: see `tptrain.data.render`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from tptrain.config.recipe_checks import CONVERSATIONS
from tptrain.config.schema import DataSection
from tptrain.data.rendered import EMPTY_COMPLETION, MISSING_COLUMN, NO_ANSWER, NOT_TEXT, ROLES, UNKNOWN_ROLE
from tptrain.errors import Problem, nearest

Record = Mapping[str, Any]
Message = dict[str, Any]

SYSTEM, USER, ASSISTANT, TOOL = ROLES[1:]


@dataclass(frozen=True)
class Pair:
    """A text and what continues it."""

    prompt: str
    completion: str

    def texts(self) -> list[str]:
        return [self.prompt + self.completion]


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them: each a dict of role, content and what else it has.

    tools: descriptions of functions that the assistant may call, each a dict (JSON schema).
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None

    def texts(self) -> list[str]:
        return [each["content"] for each in self.messages if each.get("content")]


@dataclass(frozen=True)
class Preset:
    """How a record becomes a prompt and a completion: default columns, and a template for each text.

    input_column:  of a second text of the prompt, which records may lack or leave empty; None for no such.
    with_input:    the template of a prompt that has one.
    """

    prompt_column: str
    completion_column: str
    prompt: str
    completion: str
    input_column: str | None = None
    with_input: str = ""

    def input_of(self, record: Record) -> object:
        """The second text of the prompt as the record has it; "" for none."""
        more = record.get(self.input_column) if self.input_column else None
        return "" if more is None else more

    def prompt_of(self, text: str, record: Record) -> str:
        more = self.input_of(record)
        assert isinstance(more, str), "such records are dropped"
        return self.with_input.format(text, more) if more.strip() else self.prompt.format(text)

    def question_of(self, text: str, record: Record) -> str:
        """The prompt without its form, which a chat template writes."""
        more = self.input_of(record)
        assert isinstance(more, str), "such records are dropped"
        return f"{text}\n\n{more}" if more.strip() else text


PRESETS = {
    "prompt_completion": Preset("prompt", "completion", "{}", "{}"),
    "gsm8k": Preset("question", "answer", "Question: {}\nAnswer:", " {}"),
    "alpaca": Preset(
        *("instruction", "output"),
        "### Instruction:\n{}\n\n### Response:\n",
        "{}",
        input_column="input",
        with_input="### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n",
    ),
}
# The presets whose records are conversations, and the column of their messages.
CHAT, SHAREGPT = CONVERSATIONS
MESSAGES = {CHAT: "messages", SHAREGPT: "conversations"}
TOOLS = "tools"

_SHAREGPT_ROLES = {
    "system": SYSTEM,
    **dict.fromkeys(("human", "user"), USER),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model"), ASSISTANT),
    **dict.fromkeys(("tool", "observation", "function_response"), TOOL),
}


def columns(section: DataSection) -> tuple[str, ...]:
    """The names of the prompt's and the completion's column; of conversations there is one."""
    prompt, completion = section.prompt_column, section.completion_column
    if section.preset in MESSAGES:
        return (MESSAGES[section.preset] if prompt == "auto" else prompt,)
    preset = PRESETS[section.preset]
    return (
        preset.prompt_column if prompt == "auto" else prompt,
        preset.completion_column if completion == "auto" else completion,
    )


def is_chat(section: DataSection) -> bool:
    """Whether records are written by a chat template."""
    return section.preset in MESSAGES or section.as_chat


def check_columns(found: Iterable[str], section: DataSection) -> list[Problem]:
    """A problem for each column that no record has. A record that alone lacks one is dropped and counted.

    found: the columns that any record has.
    """
    found = sorted(found)
    problems = []
    for setting, name in zip(("prompt_column", "completion_column"), columns(section), strict=False):
        if name in found:
            continue
        guess = nearest(name, found)
        fix = f"{guess!r} (did you mean it?)" if guess else _passing_column(found, setting)
        other = f"columns: {', '.join(found)}"
        problems.append(Problem(f"data.{setting}", name, "must be a column of the records", other, fix))
    return problems


def _passing_column(found: Sequence[str], setting: str) -> str:
    for name, column in MESSAGES.items():
        if column in found:
            return f"data.preset={name}"
    for name, preset in PRESETS.items():
        if preset.prompt_column in found and preset.completion_column in found:
            return f"data.preset={name}"
    return f"data.{setting}=one of these"


def said(record: Record, section: DataSection) -> Pair | Conversation | str:
    """What a record says, or the reason to drop it."""
    missing = [name for name in columns(section) if name not in record]
    if missing:
        return MISSING_COLUMN
    if section.preset in MESSAGES:
        (column,) = columns(section)
        messages = _from_sharegpt(record[column]) if section.preset == SHAREGPT else record[column]
        return (
            messages
            if isinstance(messages, str)
            else conversation(messages, _tools(record, section), section)
        )
    prompt_column, completion_column = columns(section)
    preset, prompt, completion = PRESETS[section.preset], record[prompt_column], record[completion_column]
    if not all(isinstance(each, str) for each in (prompt, completion, preset.input_of(record))):
        return NOT_TEXT
    if not completion.strip():
        return EMPTY_COMPLETION
    if section.as_chat:
        question = {"role": USER, "content": preset.question_of(prompt, record)}
        return conversation([question, {"role": ASSISTANT, "content": completion}], None, section)
    return Pair(preset.prompt_of(prompt, record), preset.completion.format(completion))


def conversation(messages: object, tools: object, section: DataSection) -> Conversation | str:
    """A conversation as chat templates take it, or what is wrong with it.

    messages: a list of dicts of role and content, both texts; an assistant that calls tools may have no
    content.
        What is None in a message is left out: a table fills it in where other messages have more.
    tools: a list of dicts, the same as JSON, or None.
    """
    dicts = _dicts(messages)
    if dicts is None:
        return NOT_TEXT
    given = [{name: part for name, part in each.items() if part is not None} for each in dicts]
    for message in given:
        if message.get("tool_calls"):
            message.setdefault("content", "")
            calls = _calls(message["tool_calls"])
            if calls is None:
                return NOT_TEXT
            message["tool_calls"] = calls
        if not all(isinstance(message.get(name), str) for name in ("role", "content")):
            return NOT_TEXT
    answers = [each for each in given if each["role"] == ASSISTANT]
    if not answers:
        return NO_ANSWER
    if not all(answer["content"].strip() or answer.get("tool_calls") for answer in answers):
        return EMPTY_COMPLETION
    described = _dicts(json_of(tools) if isinstance(tools, str) else tools or [])
    if described is None:
        return NOT_TEXT
    if section.system_prompt is not None and given[0]["role"] != SYSTEM:
        given = [{"role": SYSTEM, "content": section.system_prompt}, *given]
    return Conversation(given, described or None)


def _tools(record: Record, section: DataSection) -> object:
    return record.get(TOOLS if section.tools_column == "auto" else section.tools_column)


def _calls(calls: object) -> list[dict[str, Any]] | None:
    """Tool calls with their arguments as fields. OpenAI's are JSON in a text; templates want them read, and a
    vLLM server reads them before it asks the template."""
    dicts, found = _dicts(calls), []
    if dicts is None:
        return None
    for call in dicts:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            arguments = json_of(function["arguments"])
            if not isinstance(arguments, dict):
                return None
            call = {**call, "function": {**function, "arguments": arguments}}
        found.append(call)
    return found


def _dicts(value: object) -> list[dict[str, Any]] | None:
    """The value, if it is a list of dicts."""
    is_one = isinstance(value, list) and all(isinstance(each, dict) for each in value)
    return cast("list[dict[str, Any]]", value) if is_one else None


def json_of(text: str) -> Any:
    """What a text says in JSON; the text itself where it says nothing."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _from_sharegpt(turns: object) -> list[Message] | str:
    """Turns of `from` and `value` as messages of role and content, or why they are none."""
    dicts = _dicts(turns)
    if dicts is None:
        return NOT_TEXT
    roles = [_SHAREGPT_ROLES.get(str(turn.get("from"))) for turn in dicts]
    if None in roles:
        return UNKNOWN_ROLE
    return [{"role": role, "content": turn.get("value")} for role, turn in zip(roles, dicts, strict=True)]
