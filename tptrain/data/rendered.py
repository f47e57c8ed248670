"""What rendering makes of a record, and the reasons why it makes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Reasons why a record is dropped; these are the keys of the counts and the words that are printed.
BOUNDARY = "prompt and completion share a token"
MISSING_COLUMN = "column missing"
NOT_TEXT = "not text"
EMPTY_COMPLETION = "empty completion"
NO_ANSWER = "no turn of the assistant"
UNKNOWN_ROLE = "a role that is not known"

# Whose text a token is; index 0: nobody's, as of BOS and of what a template adds behind a turn.
ROLES = ("", "system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Rendered:
    """A record as the model sees it.

    ids:       int32 [T], the tokenizer's encoding of the whole text.
    loss_mask: bool [T], True where the token counts in the loss.
    roles:     uint8 [T], index into ROLES of whose text the token is. None where nobody asked.
    """

    ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    roles: npt.NDArray[np.uint8] | None = None

    def beginning(self, length: int) -> Rendered:
        """The first `length` tokens."""
        roles = None if self.roles is None else self.roles[:length]
        return Rendered(self.ids[:length], self.loss_mask[:length], roles)


def role_index(role: str) -> int:
    """The index of a role; roles that only some template knows are nobody's."""
    return ROLES.index(role) if role in ROLES else 0


def count_all(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The mask that counts every token which has one before it to be predicted from."""
    everything = np.ones_like(mask)
    everything[:1] = False
    return everything
