"""Greedy answers to held-out problems, scored by the rule that GSM8K publishes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from tptrain.backends.base import Backend, Tensors
from tptrain.config.plan import Plan
from tptrain.data.answers import exact_match
from tptrain.data.render import columns, encode_prompt, prompt_text
from tptrain.data.sources import load_records
from tptrain.generate.decoding import Generator


@dataclass(frozen=True)
class Answer:
    """One held-out problem: the prompt, the right completion, and what the model said."""

    prompt: str
    reference: str
    generated: str

    @property
    def is_right(self) -> bool:
        return exact_match(self.generated, self.reference)


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
    """Answers the same held-out problems whenever it is called; compiled at the first call."""

    def __init__(self, plan: Plan, backend: Backend, tokenizer: PreTrainedTokenizerFast):
        """Reads the problems that the plan's eval section names. Raises ProblemsError when it cannot."""
        section, data = plan.recipe.eval, plan.recipe.data
        path = section.path or data.path
        records = load_records(
            path,
            data.subset if path == data.path else None,
            section.split,
            section.problems,
            setting="eval.path" if section.path else "data.path",
        )
        self._tokenizer = tokenizer
        self._prompts = [prompt_text(record, data) for record in records]
        self._references = [str(record[columns(data)[1]]) for record in records]
        self._ids = [encode_prompt(tokenizer, prompt) for prompt in self._prompts]
        rows = min(section.batch_rows, len(self._ids))
        longest = max(len(ids) for ids in self._ids)
        stops = [tokenizer.eos_token_id]
        self._generator = Generator(backend, plan, rows, longest, section.max_new_tokens, stops)

    def __call__(self, params: Tensors) -> Score:
        generated = self._generator.generate(params, self._ids)
        return Score(tuple(self._answers(generated)))

    def _answers(self, generated: Sequence[list[int]]) -> list[Answer]:
        texts = [str(self._tokenizer.decode(ids, skip_special_tokens=True)) for ids in generated]
        triples = zip(self._prompts, self._references, texts, strict=True)
        return [Answer(prompt, reference, text.strip()) for prompt, reference, text in triples]
