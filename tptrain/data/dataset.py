"""All records as tokens: tokenised once, held in flat arrays, every dropped or cut record counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from transformers import PreTrainedTokenizerFast

from tptrain.config.schema import DataSection
from tptrain.data import chat
from tptrain.data.records import check_columns, is_chat
from tptrain.data.render import Renderer
from tptrain.data.rendered import BOUNDARY, Rendered
from tptrain.data.tokenizer import padding_id
from tptrain.errors import raise_if_any, refuse

TOO_LONG = "longer than seq_len"
NOTHING_COUNTED = "no completion token within seq_len"


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
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row.ids) for row in rows], out=offsets[1:])
        return TokenizedDataset(
            ids=np.concatenate([row.ids for row in rows]),
            loss_mask=np.concatenate([row.loss_mask for row in rows]),
            offsets=offsets,
            pad_id=pad_id,
            stop_ids=stop_ids,
        )


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


def tokenize_records(
    records: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast, section: DataSection
) -> tuple[TokenizedDataset, Counts]:
    """Render every record once. A record of at most seq_len tokens, EOS included, fits a row.

    The tokenizer has passed `check_tokenizer`. Raises ProblemsError when a column is missing or no record is
    left.
    """
    assert tokenizer.eos_token_id is not None
    raise_if_any(check_columns({name for record in records for name in record}, section))
    kept: list[Rendered] = []
    dropped: Counter[str] = Counter()
    truncated, longest = 0, 0
    renderer = Renderer(tokenizer, section)
    for rendered in renderer(records):
        length = 0 if isinstance(rendered, str) else len(rendered.ids)
        longest = max(longest, length)
        fitted = _fit(rendered, section)
        if isinstance(fitted, str):
            dropped[fitted] += 1
        else:
            kept.append(fitted)
            truncated += len(fitted.ids) < length
    if not kept:
        raise _nothing_left(section, dropped, longest)
    dataset = TokenizedDataset.of(kept, padding_id(tokenizer), tuple(renderer.stop_ids))
    counted = int(dataset.loss_mask.sum())
    reasons = dict(sorted(dropped.items()))
    return dataset, Counts(len(records), len(kept), reasons, truncated, len(dataset.ids), counted)


def _fit(row: Rendered | str, section: DataSection) -> Rendered | str:
    """The row if it fits, its beginning if it is to be truncated, or the reason to drop it."""
    if isinstance(row, str):
        return row
    if len(row.ids) > section.seq_len:
        if section.too_long == "drop":
            return TOO_LONG
        row = row.beginning(section.seq_len)
    return row if row.loss_mask.any() else NOTHING_COUNTED


def _nothing_left(section: DataSection, dropped: Mapping[str, int], longest: int) -> Exception:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
    most = max(dropped, key=lambda reason: dropped[reason])
    longer = dict.fromkeys((TOO_LONG, NOTHING_COUNTED), f"data.seq_len={longest}")
    if is_chat(section):
        fix = {**chat.FIXES, **longer}.get(most, chat.FIX)
    else:
        at_boundary = "prompts that do not end in a space, with completions that begin with it"
        other = "records whose prompt and completion are non-empty texts"
        fix = {BOUNDARY: at_boundary, **longer}.get(most, other)
    return refuse("data.path", section.path, "must leave a record to train on", f"dropped: {reasons}", fix)
