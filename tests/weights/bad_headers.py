"""Malformed safetensors files: what is said of each, and whether the library by itself would take it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.weights.bad_input import SINGLE, WEIGHTS, BadInput, broken


@dataclass(frozen=True)
class BadHeader:
    """content: the file. reason: part of its error. library_takes: it opens for the library alone."""

    name: str
    content: bytes
    reason: str
    library_takes: bool = False

    def bad_input(self) -> BadInput:
        change: Callable[[Path], object] = lambda folder: (folder / SINGLE).write_bytes(self.content)  # noqa: E731
        rule, fix = "must be a complete safetensors file", "an intact copy"
        return BadInput(f"safetensors: {self.name}", broken(change), WEIGHTS, SINGLE, rule, self.reason, fix)


def file(header: dict[str, Any] | bytes, data_bytes: int = 0, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data_bytes)


def f32(start: int, stop: int, shape: object = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def doubled(first: dict[str, Any], second: dict[str, Any], data_bytes: int) -> bytes:
    return file(f'{{"a": {json.dumps(first)}, "a": {json.dumps(second)}}}'.encode(), data_bytes)


BAD_HEADERS = [
    BadHeader("no length", b"abc", "header too small"),
    BadHeader("length of 0", file(b""), "EOF while parsing"),
    BadHeader("length beyond the file", file(b"{}", length=50), "invalid header length"),
    BadHeader("length above 100 MB", file(b"{}", length=100_000_001), "header too large"),
    BadHeader("length near 2 to the 64th", file(b"{}", length=2**64 - 4), "header too large"),
    BadHeader("not JSON", file(b"nonsense"), "invalid JSON"),
    BadHeader("trailing characters", file(b"{}}"), "trailing characters"),
    BadHeader("not UTF-8", file(b'{"\xff": 1}'), "invalid UTF-8"),
    BadHeader("a list", file(b"[1]"), "invalid type: sequence"),
    BadHeader("an entry that is a number", file({"a": 3}), "invalid type: integer"),
    BadHeader("nested deep", file(b'{"a":' * 100_000), "recursion limit exceeded"),
    BadHeader("metadata that is no text", file({"__metadata__": {"a": 1}}), "expected a string"),
    BadHeader("entry without a shape", file({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8), "`shape`"),
    BadHeader("unknown dtype", file({"a": f32(0, 8, dtype="F31")}, 8), "unknown variant `F31`"),
    BadHeader("fractional shape", file({"a": f32(0, 8, [2.0])}, 8), "floating point"),
    BadHeader("negative shape", file({"a": f32(0, 8, [-1, -2])}, 8), "integer `-1`"),
    BadHeader("shape that overflows", file({"a": f32(0, 8, [2**62 + 2])}, 8), "overflow"),
    BadHeader("shape that overflows before a 0", file({"a": f32(0, 0, [2**40, 2**40, 0])}), "overflow"),
    BadHeader("size other than shape times dtype", file({"a": f32(0, 8, [3])}, 8), "invalid shape"),
    BadHeader("negative offset", file({"a": f32(-8, 0)}, 8), "integer `-8`"),
    BadHeader("offsets in reverse", file({"a": f32(8, 0)}, 8), "invalid offset for tensor `a`"),
    BadHeader("three offsets", file({"a": {**f32(0, 8), "data_offsets": [0, 8, 8]}}, 8), "invalid length 3"),
    BadHeader("overlap", file({"a": f32(0, 8), "b": f32(4, 12)}, 12), "invalid offset for tensor `b`"),
    BadHeader("two names for the same bytes", file({"a": f32(0, 8), "b": f32(0, 8)}, 8), "invalid offset"),
    BadHeader("gap", file({"a": f32(0, 8), "b": f32(12, 20)}, 20), "invalid offset for tensor `b`"),
    BadHeader("gap before the first", file({"a": f32(4, 12)}, 12), "invalid offset for tensor `a`"),
    BadHeader("offset beyond the file", file({"a": f32(0, 8), "b": f32(8, 16)}, 8), "not fully covered"),
    BadHeader("data of no tensor", file({"a": f32(0, 8)}, 12), "not fully covered"),
    BadHeader("half a byte", file({"a": f32(0, 1, [1], "F4")}, 1), "subbytes"),
    BadHeader("same key twice", doubled(f32(0, 8), f32(0, 8), 8), "names a twice", library_takes=True),
    BadHeader(
        "same key twice, with another dtype",
        doubled(f32(0, 8), f32(0, 8, dtype="I32"), 8),
        "names a twice",
        library_takes=True,
    ),
    BadHeader("same key twice, with other data", doubled(f32(0, 8), f32(8, 16), 16), "invalid offset"),
    BadHeader("empty name", file({"": f32(0, 8)}, 8), "a tensor is named ''", library_takes=True),
    BadHeader("NUL in a name", file({"a\0b": f32(0, 8)}, 8), r"named 'a\x00b'", library_takes=True),
    BadHeader("line break in a name", file({"a\nb": f32(0, 8)}, 8), r"named 'a\nb'", library_takes=True),
    BadHeader(
        "a terminal's control characters in a name",
        file({"a\x1b[2J": f32(0, 8)}, 8),
        r"named 'a\x1b[2J'",
        library_takes=True,
    ),
    BadHeader(
        "number of 5000 digits in a field of no meaning",
        file(json.dumps({"a": {**f32(0, 8), "x": 1}}).replace('"x": 1', '"x": ' + "9" * 5000).encode(), 8),
        "number out of range",
    ),
]
