"""The records of a recipe as the model will see them, counted and compared with what a server sends."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from tptrain.config.schema import DataSection
from tptrain.data.dataset import Counts, Fitting
from tptrain.data.packing import PackedRows
from tptrain.data.records import Record, is_chat
from tptrain.data.render import Question, Renderer
from tptrain.data.rendered import ROLES, Rendered
from tptrain.errors import Problem

BINS = 20
COMPARED = 1000  # questions that are tokenised once more as a server does it
_NAMED = 5  # different first or last tokens that are named


@dataclass(frozen=True)
class Token:
    """One token of a row. text: what it decodes to by itself. counted: in the loss."""

    id: int
    text: str
    role: str
    counted: bool


@dataclass(frozen=True)
class Example:
    """A record and its row. number: of the record, from 1. reason: why it has no row, "" where it has one."""

    number: int
    record: Record
    tokens: tuple[Token, ...]
    reason: str = ""


@dataclass(frozen=True)
class Lengths:
    """Tokens of records: how many records lie from one edge of `edges` to the next, and some quantiles."""

    edges: tuple[int, ...]
    records: tuple[int, ...]
    mean: float
    median: int
    p95: int
    longest: int

    @staticmethod
    def of(lengths: npt.NDArray[np.int64]) -> Lengths:
        top = int(lengths.max())
        edges = np.unique(np.linspace(0, top, min(BINS, top) + 1).round().astype(int))
        # Bins hold their upper edge.
        records = np.bincount(np.searchsorted(edges[1:], lengths), minlength=len(edges) - 1)
        median, p95 = (int(np.quantile(lengths, part, method="inverted_cdf")) for part in (0.5, 0.95))
        return Lengths(
            tuple(edges.tolist()), tuple(records.tolist()), float(lengths.mean()), median, p95, top
        )


@dataclass(frozen=True)
class Filling:
    """How full rows of seq_len tokens are. rows: of an epoch. density: tokens over all places.
    records_per_row: mean."""

    rows: int
    density: float
    records_per_row: float

    @staticmethod
    def of(rows: int, lengths: npt.NDArray[np.int64], seq_len: int) -> Filling:
        return Filling(rows, float(lengths.sum() / (rows * seq_len)), len(lengths) / rows)


@dataclass(frozen=True)
class Served:
    """What a vLLM server sends for the same records, against the rows.

    endpoint:    of the server.
    compared:    records with a question, COMPARED at most.
    same_prompt: those of them whose row begins with the ids that are sent.
    begins_with, sent_begins_with: first tokens of the rows, and of what is sent, each with its count.
    ends_with:   tokens that end what is counted, each with its count.
    stops:       token -> id at which a server of the exported model stops.
    unstopped:   rows that end with none of these.
    """

    endpoint: str
    compared: int
    same_prompt: int
    begins_with: dict[str, int]
    sent_begins_with: dict[str, int]
    ends_with: dict[str, int]
    stops: dict[str, int]
    unstopped: int


@dataclass(frozen=True)
class Findings:
    """All that an inspection tells.

    lengths:  of all records that could be rendered, cut and dropped ones included; None where none could.
    fillings: by `data.packing`. problems: what keeps a run from training on the records.
    """

    counts: Counts
    lengths: Lengths | None
    fillings: dict[str, Filling]
    served: Served
    examples: tuple[Example, ...]
    dropped: tuple[Example, ...]
    problems: tuple[Problem, ...]


def inspect_records(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerFast, section: DataSection, shown: int
) -> Findings:
    """Render all records as a run would.

    shown: how many rows are shown, from the first record on; of each reason to drop a record, the first.
    Raises ProblemsError where no record can be rendered at all, such as for want of a chat template.
    """
    waiting: deque[Record] = deque()  # read, and not yet rendered
    fitting = Fitting(_remembered(records, waiting), tokenizer, section, with_roles=True)
    serving = _Serving(tokenizer, section)
    lengths: list[int] = []  # of all rendered records
    filled: list[int] = []  # of the rows
    examples: list[Example] = []
    dropped: dict[str, Example] = {}
    for number, outcome in enumerate(fitting.outcomes(), start=1):
        record = waiting.popleft()
        lengths += [fitting.length] if fitting.length else []
        if isinstance(outcome, str):
            dropped.setdefault(outcome, Example(number, record, (), outcome))
            continue
        filled.append(len(outcome.ids))
        serving.compare(record, outcome)
        if len(examples) < shown:
            examples.append(Example(number, record, tokens_of(outcome, tokenizer)))
    return Findings(
        counts=fitting.counts,
        lengths=Lengths.of(np.asarray(lengths, dtype=np.int64)) if lengths else None,
        fillings=_fillings(np.asarray(filled, dtype=np.int64), section.seq_len) if filled else {},
        served=serving.found(fitting.stop_ids),
        examples=tuple(examples),
        dropped=tuple(dropped.values()),
        problems=tuple(fitting.problems()),
    )


def _fillings(lengths: npt.NDArray[np.int64], seq_len: int) -> dict[str, Filling]:
    rows = {"none": len(lengths), "best_fit": len(PackedRows(lengths, seq_len, seed=0))}
    return {name: Filling.of(count, lengths, seq_len) for name, count in rows.items()}


def tokens_of(row: Rendered, tokenizer: PreTrainedTokenizerFast) -> tuple[Token, ...]:
    """The tokens of a row, one by one."""
    assert row.roles is not None
    return tuple(
        Token(token, _text(token, tokenizer), ROLES[role], bool(counted))
        for token, role, counted in zip(row.ids.tolist(), row.roles, row.loss_mask, strict=True)
    )


def _text(token: int, tokenizer: PreTrainedTokenizerFast) -> str:
    text = str(tokenizer.decode([token]))
    # A part of a character has no text of its own; a piece that loses its space has it in its name.
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if "\ufffd" in text or not text:
        return piece
    return f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else text


def _remembered(records: Iterable[Record], waiting: deque[Record]) -> Iterator[Record]:
    for record in records:
        waiting.append(record)
        yield record


class _Serving:
    """Compares rows with what a vLLM server sends for the same records."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, section: DataSection):
        self._tokenizer, self._is_chat = tokenizer, is_chat(section)
        self._renderer = Renderer(tokenizer, section)
        self._compared = self._same = 0
        self._begins: Counter[int] = Counter()
        self._sent: Counter[int] = Counter()
        self._ends: Counter[int] = Counter()

    def compare(self, record: Record, row: Rendered) -> None:
        """Every row's end is counted; the first `COMPARED` questions are tokenised as a server does."""
        ids = row.ids.tolist()
        self._begins[ids[0]] += 1
        self._ends[ids[int(np.flatnonzero(row.loss_mask)[-1])]] += 1
        if self._compared == COMPARED:
            return
        question = self._renderer.question(record)
        if isinstance(question, Question):
            # /v1/chat/completions tokenises what the template wrote as it is; /v1/completions adds what the
            # tokenizer adds to any text.
            sent = question.ids if self._is_chat else self._tokenizer(question.prompt).input_ids
            self._compared += 1
            self._same += ids[: len(sent)] == sent
            self._sent[sent[0] if sent else -1] += 1

    def found(self, stops: tuple[int, ...]) -> Served:
        return Served(
            endpoint="/v1/chat/completions" if self._is_chat else "/v1/completions",
            compared=self._compared,
            same_prompt=self._same,
            begins_with=self._named(self._begins),
            sent_begins_with=self._named(self._sent),
            ends_with=self._named(self._ends),
            stops={self._name(stop): stop for stop in stops},
            unstopped=sum(count for token, count in self._ends.items() if token not in stops),
        )

    def _named(self, counts: Counter[int]) -> dict[str, int]:
        return {self._name(token): count for token, count in counts.most_common(_NAMED)}

    def _name(self, token: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token)) if token >= 0 else "nothing"
