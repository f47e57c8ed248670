"""Greedy answers to held-out problems, scored by the rule that GSM8K publishes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerFast

from tptrain.backends.base import Backend, Tensors
from tptrain.config.plan import Plan
from tptrain.config.schema import DataSection
from tptrain.data.answers import exact_match
from tptrain.data.records import check_columns
from tptrain.data.render import Question, Renderer
from tptrain.data.sources import Record, Records, load_records
from tptrain.errors import raise_if_any, refuse
from tptrain.generate.decoding import Generator


@dataclass(frozen=True)
class Answer:
    """What the model answered to one held-out problem."""

    problem: Question
    generated: str

    @property
    def is_right(self) -> bool:
        return exact_match(self.generated, self.problem.answer)


@dataclass(frozen=True)
class Score:
    """The answers to all problems."""

    answers: tuple[Answer, ...]

    @property
    def right(self) -> int:
        return sum(answer.is_right for answer in self.answers)

    @property
    def rate(self) -> float:
        return self.right / len(self.answers)


class ExactMatch:
    """Answers the same held-out problems whenever it is called; compiled at the first call.

    skipped: problems left out: no question and answer, or too long for the positions with an answer behind
    them.
    """

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        tokenizer: PreTrainedTokenizerFast,
        stops: Sequence[int] = (),
        validation: Records | None = None,
    ):
        """Reads the problems that the plan's eval section names. Raises ProblemsError when it cannot.

        stops: ids that end an answer, beside EOS.
        validation: the records that data.validation has set apart, if any.
        """
        section, data = plan.recipe.eval, plan.recipe.data
        records = _records(plan, validation)
        raise_if_any(check_columns({name for record in records for name in record}, data))
        self._tokenizer = tokenizer
        room = plan.facts.max_position_embeddings - section.max_new_tokens
        self._problems = _fitting_problems(records, data, tokenizer, room)
        self.skipped = len(records) - len(self._problems)
        if not self._problems:
            rule, other = (
                "must leave a problem to answer",
                f"{len(records)} problems, positions left for prompts: {room}",
            )
            raise refuse(
                "eval.max_new_tokens", section.max_new_tokens, rule, other, "fewer, or shorter problems"
            )
        rows = min(section.batch_rows, len(self._problems))
        longest = max(len(problem.ids) for problem in self._problems)
        ends = sorted({tokenizer.eos_token_id, *stops})
        self._generator = Generator(backend, plan, rows, longest, section.max_new_tokens, ends)

    def __call__(self, params: Tensors) -> Score:
        generated = self._generator.generate(params, [problem.ids for problem in self._problems])
        return Score(tuple(self._answers(generated)))

    def _answers(self, generated: Sequence[list[int]]) -> list[Answer]:
        texts = [str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in generated]
        return [Answer(problem, text) for problem, text in zip(self._problems, texts, strict=True)]


def _records(plan: Plan, validation: Records | None) -> Sequence[Record]:
    """The held-out problems: from eval.path, or the builtin's own, or those set apart."""
    section, data = plan.recipe.eval, plan.recipe.data
    if section.path is None and validation is not None and not data.path.startswith("builtin:"):
        return list(islice(validation, section.problems))
    setting, path = ("eval.path", section.path) if section.path else ("data.path", data.path)
    return load_records(path, section.subset, section.split, section.problems, setting)


def _fitting_problems(
    records: Sequence[Mapping[str, Any]], data: DataSection, tokenizer: PreTrainedTokenizerFast, room: int
) -> list[Question]:
    """The records that ask for an answer, in a prompt of 1 to `room` tokens."""
    renderer = Renderer(tokenizer, data)
    questions = (renderer.question(record) for record in records)
    return [each for each in questions if isinstance(each, Question) and 0 < len(each.ids) <= room]
