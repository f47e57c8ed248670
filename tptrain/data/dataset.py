"""All records as tokens: tokenised once, held in flat arrays, every dropped or cut record counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash
from transformers import PreTrainedTokenizerFast

from tptrain.config.schema import DataSection
from tptrain.data import chat
from tptrain.data.records import Record, check_columns, is_chat
from tptrain.data.render import Renderer
from tptrain.data.rendered import BOUNDARY, EMPTY_COMPLETION, NO_ANSWER, Rendered
from tptrain.data.tokenizer import padding_id
from tptrain.errors import Problem, raise_if_any

TOO_LONG = "longer than seq_len"
NOTHING_COUNTED = "no completion token within seq_len"
_UNLABELLED = (EMPTY_COMPLETION, NO_ANSWER, NOTHING_COUNTED)


@dataclass(frozen=True)
class TokenizedDataset:
    """Rows of tokens, one after the other in flat arrays; N rows, S tokens in all.

    ids:       int32 [S].
    loss_mask: bool [S], True where the token counts in the loss.
    offsets:   int64 [N + 1]; row i lies at [offsets[i], offsets[i + 1]).
    pad_id:    the id that fills rows up.
    stop_ids:  ids of the tokens that end what the loss counts, EOS first: a server must stop at them.
    """

    ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]
    pad_id: int
    stop_ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Ids and loss mask of one row, as views."""
        assert 0 <= index < len(self), index
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[span], self.loss_mask[span]

    def digest(self) -> str:
        """Hexadecimal XXH3-128 of ids, masks and lengths in order: equal for the same samples, whatever file
        they were read from."""
        digest = xxhash.xxh3_128()
        for array in (self.offsets, self.ids, self.loss_mask):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @staticmethod
    def of(rows: Sequence[Rendered], pad_id: int, stop_ids: tuple[int, ...] = ()) -> TokenizedDataset:
        return TokenizedDataset(
            ids=np.concatenate([row.ids for row in rows]),
            loss_mask=np.concatenate([row.loss_mask for row in rows]),
            offsets=offsets_of([len(row.ids) for row in rows]),
            pad_id=pad_id,
            stop_ids=stop_ids,
        )


def offsets_of(lengths: Sequence[int]) -> npt.NDArray[np.int64]:
    """Where each row begins and the last one ends: int64 [N + 1]."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


@dataclass(frozen=True)
class Counts:
    """What became of the records.

    dropped:   reason -> records.
    truncated: records kept without their end; EOS is lost with it.
    tokens:    tokens of the kept records. counted: those among them that count in the loss.
    """

    records: int
    kept: int
    dropped: Mapping[str, int]
    truncated: int
    tokens: int
    counted: int

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        dropped = f"{self.records - self.kept:,} dropped" + (f" ({reasons})" if reasons else "")
        share = f"{self.counted:,} of them counted in the loss"
        return (
            f"{self.records:,} records: {self.kept:,} kept, {dropped}, "
            f"{self.truncated:,} truncated; {self.tokens:,} tokens, {share}"
        )


class Fitting:
    """The rows of records that fit a row and have something that counts; all others counted by reason.

    Iterated over once. `counts` and `stop_ids` tell of all records when the last one is through.

    length: tokens of the record that the last outcome is of, before it was cut or dropped; 0: not rendered.
    """

    def __init__(
        self,
        records: Iterable[Record],
        tokenizer: PreTrainedTokenizerFast,
        section: DataSection,
        with_roles: bool = False,
    ):
        """The tokenizer has passed `check_tokenizer`. Raises ProblemsError when it lacks a chat template that
        the records need."""
        assert tokenizer.eos_token_id is not None
        self._records, self._section = records, section
        self._renderer = Renderer(tokenizer, section, with_roles)
        self.length = 0
        self._columns: set[str] = set()
        self._dropped: Counter[str] = Counter()
        self._seen = self._kept = self._truncated = self._longest = self._tokens = self._counted = 0

    def __iter__(self) -> Iterator[Rendered]:
        """The rows. Raises ProblemsError with `problems` behind the last one."""
        yield from (outcome for outcome in self.outcomes() if not isinstance(outcome, str))
        raise_if_any(self.problems())

    def outcomes(self) -> Iterator[Rendered | str]:
        """The row of each record, or the reason why it has none, in order."""
        for rendered in self._renderer(self._read()):
            self.length = length = 0 if isinstance(rendered, str) else len(rendered.ids)
            self._longest = max(self._longest, length)
            fitted = _fit(rendered, self._section)
            if isinstance(fitted, str):
                self._dropped[fitted] += 1
            else:
                self._kept += 1
                self._truncated += len(fitted.ids) < length
                self._tokens += len(fitted.ids)
                self._counted += int(np.count_nonzero(fitted.loss_mask))
            yield fitted

    def problems(self) -> list[Problem]:
        """What keeps a run from training on the records read so far: a column that none has, no row, too many
        records without anything that counts."""
        missing = check_columns(self._columns, self._section)
        if missing or not self._kept:
            return missing or [_nothing_left(self._section, self._dropped, self._longest)]
        return _unlabelled(self._section, self._seen, self._dropped)

    def _read(self) -> Iterator[Record]:
        for record in self._records:
            self._seen += 1
            self._columns.update(record)
            yield record

    @property
    def counts(self) -> Counts:
        dropped = dict(sorted(self._dropped.items()))
        return Counts(self._seen, self._kept, dropped, self._truncated, self._tokens, self._counted)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return tuple(self._renderer.stop_ids)


def tokenize_records(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerFast, section: DataSection
) -> tuple[TokenizedDataset, Counts]:
    """Render every record once, into memory. A record of at most seq_len tokens, EOS included, fits a row.

    Raises ProblemsError: see `Fitting`.
    """
    fitting = Fitting(records, tokenizer, section)
    rows = list(fitting)
    return TokenizedDataset.of(rows, padding_id(tokenizer), fitting.stop_ids), fitting.counts


def _fit(row: Rendered | str, section: DataSection) -> Rendered | str:
    """The row if it fits, its beginning if it is to be truncated, or the reason to drop it."""
    if isinstance(row, str):
        return row
    if len(row.ids) > section.seq_len:
        if section.too_long == "drop":
            return TOO_LONG
        row = row.beginning(section.seq_len)
    return row if row.loss_mask.any() else NOTHING_COUNTED


def _unlabelled(section: DataSection, records: int, dropped: Mapping[str, int]) -> list[Problem]:
    """Records without anything to learn are a sign of a wrong preset, column or template, where they are
    many."""
    count = sum(dropped.get(reason, 0) for reason in _UNLABELLED)
    share = count / records
    if share <= section.max_unlabelled:
        return []
    reasons = ", ".join(f"{dropped[reason]:,} {reason}" for reason in _UNLABELLED if reason in dropped)
    rule = "is the largest share of records in which the loss counts nothing"
    enough = math.ceil(share * 100) / 100
    fix = f"data.max_unlabelled={enough:g}, or other records (tptrain data inspect shows them)"
    other = f"{count:,} of {records:,} records: {reasons}"
    return [Problem("data.max_unlabelled", section.max_unlabelled, rule, other, fix)]


def _nothing_left(section: DataSection, dropped: Mapping[str, int], longest: int) -> Problem:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
    most = max(dropped, key=lambda reason: dropped[reason])
    longer = dict.fromkeys((TOO_LONG, NOTHING_COUNTED), f"data.seq_len={longest}")
    if is_chat(section):
        fix = {**chat.FIXES, **longer}.get(most, chat.FIX)
    else:
        at_boundary = "prompts that do not end in a space, with completions that begin with it"
        other = "records whose prompt and completion are non-empty texts"
        fix = {BOUNDARY: at_boundary, **longer}.get(most, other)
    return Problem("data.path", section.path, "must leave a record to train on", f"dropped: {reasons}", fix)
