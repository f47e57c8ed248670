"""Reading the programs that XLA has written down."""

from __future__ import annotations


def module_of(dumped: bytes) -> bytes:
    """A dump holds an HloProto, whose first field is the module."""
    assert dumped[0] == 0x0A
    size = shift = 0
    for at in range(1, 10):
        size |= (dumped[at] & 0x7F) << shift
        shift += 7
        if dumped[at] < 0x80:
            return dumped[at + 1 : at + 1 + size]
    raise AssertionError("no length")
