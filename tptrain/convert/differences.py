"""What differs between two models on disk, compared value by value in a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tptrain.convert.inspecting import shown
from tptrain.convert.sides import Side

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_MOST_NAMES = 20
# torch works on so many elements in the calling thread, and they stay in the processor's cache; for more it
# wakes other threads and waits for them, ten times as long where the processors are busy (measured).
_PIECE_ELEMENTS = 2**15

Progress = Callable[[int], None]


@dataclass(frozen=True)
class TensorDifference:
    """count: elements whose bits differ; values, where the dtypes do. largest: max|d|, NaN if any is."""

    name: str
    count: int
    elements: int
    largest: float

    def __str__(self) -> str:
        return f"{self.name}: {self.count:,} of {self.elements:,} elements, max|d| {self.largest:.6g}"


@dataclass(frozen=True)
class Differences:
    """only_a, only_b: names of arrays. forms: name -> shape and dtype on both sides, where they differ.

    tensors: those of one shape whose values differ. equal: how many tensors are the same bit for bit.
    facts:   `config.FIELD` or `run.FACT` -> its values on both sides, where they differ.
    """

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    forms: Mapping[str, tuple[str, str]]
    tensors: tuple[TensorDifference, ...]
    facts: Mapping[str, tuple[Any, Any]]
    equal: int

    def __bool__(self) -> bool:
        return bool(self.only_a or self.only_b or self.forms or self.tensors or self.facts)


def compared_names(one: Side, other: Side) -> tuple[list[str], list[str]]:
    """The arrays that count on each side: moments and the like only where both sides are steps."""
    both_steps = one.run is not None and other.run is not None
    mine, theirs = ([n for n in side.arrays if both_steps or "/" not in n] for side in (one, other))
    return mine, theirs


def compared_bytes(one: Side, other: Side) -> int:
    """How many bytes `compare` reads: of both sides, where the shapes are equal."""
    mine, theirs = compared_names(one, other)
    both = [n for n in mine if n in theirs and one.arrays[n].shape == other.arrays[n].shape]
    return sum(one.arrays[name].num_bytes + other.arrays[name].num_bytes for name in both)


def compare(one: Side, other: Side, progress: Progress = lambda num_bytes: None) -> Differences:
    """All differences. progress: told the bytes of both sides that were compared since its last call."""
    mine, theirs = compared_names(one, other)
    forms, tensors, equal = {}, [], 0
    for name in (name for name in mine if name in theirs):
        a, b = one.arrays[name], other.arrays[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            forms[name] = (f"{list(a.shape)} {a.dtype}", f"{list(b.shape)} {b.dtype}")
        if a.shape != b.shape:
            continue
        found = tensor_difference(name, one.blocks[name](), other.blocks[name](), progress)
        tensors += [found] if found else []
        equal += not found and name not in forms
    only_a = tuple(name for name in mine if name not in theirs)
    only_b = tuple(name for name in theirs if name not in mine)
    return Differences(only_a, only_b, forms, tuple(tensors), _facts(one, other), equal)


def tensor_difference(
    name: str,
    one: Iterator[torch.Tensor],
    other: Iterator[torch.Tensor],
    progress: Progress = lambda num_bytes: None,
) -> TensorDifference | None:
    """Compare two streams of row blocks of tensors of one shape; None if they are equal."""
    count = elements = 0
    largest = 0.0
    for mine, theirs in _aligned(one, other):
        found, gap = _gap(mine, theirs)
        elements, count = elements + mine.numel(), count + found
        # Not max(), which may drop a NaN.
        largest = gap if gap != gap or gap > largest else largest
        progress(mine.nbytes + theirs.nbytes)
    return TensorDifference(name, count, elements, largest) if count else None


def _gap(mine: torch.Tensor, theirs: torch.Tensor) -> tuple[int, float]:
    """How many elements differ (bits where the dtypes are equal, else values), and by how much at most."""
    if mine.dtype == theirs.dtype:
        differs = mine.view(_WORDS[mine.itemsize]) != theirs.view(_WORDS[mine.itemsize])
    else:
        differs = mine.double() != theirs.double()
    count = int(differs.count_nonzero())
    if not count:
        return 0, 0.0
    # Equal infinities have no difference, but their subtraction is NaN.
    gaps = (mine.double() - theirs.double()).abs_().masked_fill_(~differs, 0.0)
    return count, gaps.max().item()


def _aligned(
    one: Iterator[torch.Tensor], other: Iterator[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both streams to their ends, in flat pieces of equal length, whatever their blocks are."""
    nothing = mine = theirs = torch.empty(0)
    while True:
        mine = mine if mine.numel() else next(one, nothing).reshape(-1)
        theirs = theirs if theirs.numel() else next(other, nothing).reshape(-1)
        length = min(mine.numel(), theirs.numel(), _PIECE_ELEMENTS)
        if not length:
            assert not mine.numel() and not theirs.numel(), "tensors of one shape have one length"
            return
        yield mine[:length], theirs[:length]
        mine, theirs = mine[length:], theirs[length:]


def _facts(one: Side, other: Side) -> dict[str, tuple[Any, Any]]:
    pairs = [("config", one.config, other.config)]
    if one.run is not None and other.run is not None:
        pairs.append(("run", _flat(one.run), _flat(other.run)))
    return {
        f"{part}.{name}": (mine.get(name), theirs.get(name))
        for part, mine, theirs in pairs
        for name in sorted({*mine, *theirs})
        if mine.get(name) != theirs.get(name)
    }


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a run, the parts of its sections by themselves: `mesh.fsdp`."""
    flat: dict[str, Any] = {}
    for name, value in run.items():
        section = isinstance(value, dict)
        flat |= {f"{name}.{part}": v for part, v in value.items()} if section else {name: value}
    return flat


def as_page(found: Differences) -> str:
    """The differences for people, in sections; the first names of long ones."""
    sections = [
        ("only in A", list(found.only_a)),
        ("only in B", list(found.only_b)),
        ("other shape or dtype", [f"{name}: {a} / {b}" for name, (a, b) in found.forms.items()]),
        ("other values", [str(tensor) for tensor in found.tensors]),
        ("other facts", [f"{name}: {shown(a)} / {shown(b)}" for name, (a, b) in found.facts.items()]),
    ]
    lines = [f"equal bit for bit: {found.equal} tensors"]
    for title, entries in sections:
        lines += [f"{title}: {len(entries)}"] if entries else []
        lines += [f"  {entry}" for entry in entries[:_MOST_NAMES]]
        lines += [f"  and {len(entries) - _MOST_NAMES} more"] if len(entries) > _MOST_NAMES else []
    return "\n".join(lines if found else [*lines, "no differences"])
