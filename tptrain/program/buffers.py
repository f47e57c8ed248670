"""The memory of a compiled program, from libtpu's dump of its buffer assignment and from its error messages.

The buffer assignment is written before the check that the program fits, in one form by all versions seen
(0.0.21 to 0.0.52), so a program that is too large is described with the same exactness as one that fits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tptrain.program.hlo_text import Module, arrays_of

# Of HBM alone; the other memories of a chip have a color of their own.
_ALLOCATION = re.compile(r"allocation (\d+): size (\d+)(.*):$")
_VALUE = re.compile(r" value: <\d+ (.+?) @\d+> \(size=(\d+),offset=(\d+)\): (.*)$")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Buffer:
    """Memory of one value. name: a parameter's name or the traced program's name of the operation."""

    name: str
    shape: str
    num_bytes: int
    kind: str


@dataclass
class _Value:
    name: str
    num_bytes: int
    offset: int
    shape: str


@dataclass
class _Allocation:
    size: int
    traits: str
    values: list[_Value] = field(default_factory=list)

    @property
    def parameter(self) -> int | None:
        found = re.search(r"parameter (\d+)", self.traits)
        return int(found[1]) if found else None


@dataclass(frozen=True)
class HbmUse:
    """HBM of a program. total_bytes: of all allocations, arguments included, aliased ones once.

    temporary_bytes: of what is neither argument nor output.
    """

    total_bytes: int
    temporary_bytes: int
    largest: tuple[Buffer, ...]


@dataclass(frozen=True)
class OutOfMemory:
    """A program that does not fit. available_bytes: what one program may use, after libtpu's reserve."""

    needed_bytes: int
    available_bytes: int


def hbm_use(
    assignment: str, module: Module | None, parameter_names: Sequence[str] = (), count: int = 20
) -> HbmUse:
    """The HBM that a buffer assignment takes, and its `count` largest buffers.

    assignment: text of `*buffer-assignment.txt`. module: the same program's HLO text, for the names of
    operations. parameter_names: of ENTRY's parameters in order; "parameter 3" where there is none.

    Values share memory at different times. Of the temporaries those are listed that together fill them: the
    largest first, then the largest that overlaps none listed, and so on.
    """
    allocations = [one for one in _allocations(assignment) if _in_hbm(one)]
    names = _operation_names(module)
    buffers: list[Buffer] = []
    for allocation in allocations:
        if allocation.parameter is not None:
            buffers.append(_parameter_buffer(allocation, parameter_names))
        else:
            kind = "output" if "maybe-live-out" in allocation.traits else "temporary"
            buffers += _disjoint(allocation, names, kind)
    largest = sorted(buffers, key=lambda buffer: -buffer.num_bytes)[:count]
    temporary = sum(one.size for one in allocations if "preallocated-temp" in one.traits)
    return HbmUse(sum(one.size for one in allocations), temporary, tuple(largest))


def _allocations(assignment: str) -> Iterator[_Allocation]:
    current: _Allocation | None = None
    for line in assignment.split("\n"):
        if head := _ALLOCATION.match(line):
            if current is not None:
                yield current
            current = _Allocation(int(head[2]), head[3])
        elif current is not None and (value := _VALUE.match(line)):
            current.values.append(_Value(value[1], int(value[2]), int(value[3]), value[4]))
        elif line.startswith("Total bytes used"):
            break
    if current is not None:
        yield current


def _in_hbm(allocation: _Allocation) -> bool:
    return "color" not in allocation.traits and "thread-local" not in allocation.traits


def _parameter_buffer(allocation: _Allocation, names: Sequence[str]) -> Buffer:
    number = allocation.parameter
    assert number is not None
    name = names[number] if number < len(names) else f"parameter {number}"
    shape = re.search(r"shape \|(.*?)\|", allocation.traits)
    return Buffer(name, shape[1] if shape else "", allocation.size, "argument")


def _disjoint(allocation: _Allocation, names: dict[str, str], kind: str) -> Iterator[Buffer]:
    """Values of one allocation of which no two share memory, largest first."""
    taken: list[tuple[int, int]] = []
    ordered = sorted(allocation.values, key=lambda value: (-value.num_bytes, not _has_name(value, names)))
    for value in ordered:
        end = value.offset + value.num_bytes
        if any(value.offset < last and first < end for first, last in taken):
            continue
        taken.append((value.offset, end))
        yield Buffer(_value_name(value, names), _shape_text(value.shape), value.num_bytes, kind)


def _has_name(value: _Value, names: dict[str, str]) -> bool:
    """Whether it is an operation of the traced program; what a loop hands on is called after the loop."""
    return "(phi)" not in value.name and _instruction_name(value) in names


def _instruction_name(value: _Value) -> str:
    return value.name.split("{")[0].split(" ")[0]


def _value_name(value: _Value, names: dict[str, str]) -> str:
    instruction = _instruction_name(value)
    return names.get(instruction, instruction)


def _operation_names(module: Module | None) -> dict[str, str]:
    if module is None:
        return {}
    return {
        one.name: one.op_name
        for computation in module.computations.values()
        for one in computation.instructions
        if one.op_name
    }


def _shape_text(shape: str) -> str:
    """`f32[2,3]` without its layout; a tuple's arrays side by side."""
    arrays = [f"{array.dtype}[{','.join(map(str, array.dims))}]" for array in arrays_of(shape)]
    return arrays[0] if len(arrays) == 1 else f"({', '.join(arrays)})"


def out_of_memory(message: str) -> OutOfMemory | None:
    """The sizes in libtpu's message that a program does not fit into HBM; None for any other message.

    "Used 16.00G of 15.75G hbm" (to 0.0.24), "the total memory required for HLO temporaries (28.00G) exceeds
    available HBM (15.75G)" (0.0.52). G is GiB, to 0.01 of it; what is used may leave out the arguments.
    """
    size = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"Used {size}i?B? of {size}i?B? hbm", message) or re.search(
        rf"\({size}i?B?\) exceeds\s+(?:the )?available HBM \({size}i?B?\)", message
    )
    if found is None:
        return None
    return OutOfMemory(_bytes(found[1], found[2]), _bytes(found[3], found[4]))


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])
