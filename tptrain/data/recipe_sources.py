"""The sources of a recipe, each with its records and the form in which they become tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerFast

from tptrain.config.mixing import problems_of_source, source_sections
from tptrain.config.schema import DataSection
from tptrain.data.dataset import Counts, TokenizedDataset
from tptrain.data.render import texts_of
from tptrain.data.sources import Records, open_records
from tptrain.data.split import split_records
from tptrain.data.token_cache import tokenized
from tptrain.errors import ProblemsError


@dataclass(frozen=True)
class Source:
    """One source of records.

    name:     as the recipe has it; "" where there is but one.
    section:  of a recipe that had this source alone.
    held_out: the records that data.validation sets apart; None without it.
    """

    name: str
    section: DataSection
    records: Records
    held_out: Records | None

    @property
    def title(self) -> str:
        """What a line on it begins with."""
        return f"Data of {self.name}" if self.name else "Data"

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Problems raised in the block are named by the settings of this source."""
        with _naming(self.name):
            yield

    def tokenized(
        self, tokenizer: PreTrainedTokenizerFast, say: Callable[[str], None]
    ) -> tuple[TokenizedDataset, Counts]:
        """The rows of the records. Raises ProblemsError as `token_cache.tokenized` does."""
        with self.naming():
            return tokenized(self.records, tokenizer, self.section, say)

    def held_out_rows(
        self, tokenizer: PreTrainedTokenizerFast, say: Callable[[str], None]
    ) -> tuple[TokenizedDataset, Counts]:
        """Those of the records that are set apart."""
        assert self.held_out is not None, "data.validation"
        # Few records may by chance be unlabelled ones for the most part; training tells of a wrong preset.
        return tokenized(self.held_out, tokenizer, replace(self.section, max_unlabelled=1.0), say)


def open_sources(data: DataSection) -> list[Source]:
    """The sources of a recipe, in the order of their names. Raises ProblemsError where one cannot be read, or
    data.validation leaves nothing of it on one side."""
    found = []
    for name, section in source_sections(data).items():
        with _naming(name):
            of_source = f"data.sources.{name}.path" if name else "data.path"
            places = (section.path, section.subset, section.split, section.max_records)
            records, held_out = open_records(*places, of_source), None
            if section.validation:
                records, held_out = split_records(records, section)
            found.append(Source(name, section, records, held_out))
    return found


def texts_of_sources(sources: Sequence[Source]) -> Iterator[str]:
    """What the records of all sources say, for making a tokenizer."""
    for source in sources:
        yield from texts_of(source.records, source.section)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except ProblemsError as error:
        raise ProblemsError(problems_of_source(error.problems, name)) from error
