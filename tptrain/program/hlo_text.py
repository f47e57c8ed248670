"""XLA's HLO text, read into plain data: computations, instructions, shapes, attributes.

Written for the modules that libtpu dumps (`*.after_codegen.txt` and the like): one instruction a line. Reads
only what the analysis needs; attributes stay text until asked for, because a module has tens of megabytes of
them. The grammar is XLA's (openxla.org/xla/operation_semantics, and `hlo_parser.cc`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from tptrain.errors import TptrainError

_DTYPE_BITS = {
    "pred": 8,
    **{f"{kind}{bits}": bits for kind in ("s", "u") for bits in (2, 4, 8, 16, 32, 64)},
    **{"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128},
    **dict.fromkeys(("f8e5m2", "f8e4m3", "f8e4m3fn", "f8e4m3b11fnuz", "f8e5m2fnuz", "f8e3m4"), 8),
    **{"f8e4m3fnuz": 8, "f8e8m0fnu": 8, "f4e2m1fn": 4, "token": 0, "opaque": 0},
}
# What libtpu writes where it has no estimate.
NO_ESTIMATE = 2**63 - 1


class HloTextError(TptrainError):
    """Text that is not an HLO module as XLA prints it."""


# As in xla/layout.h: Layout::kHostMemorySpace.
HOST_SPACE = 5


@dataclass(frozen=True)
class Array:
    """The type and size of one array.

    memory_space: 0 for HBM, HOST_SPACE for the host's memory, others for memories of the chip itself.
    """

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0

    @property
    def num_elements(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements, without the padding of tiles."""
        return (self.num_elements * _DTYPE_BITS[self.dtype] + 7) // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    arrays:   the arrays of the result, a tuple's flattened.
    operands: names of the operands; their arrays are those of the instructions of that name.
    literal:  what stands between the parentheses, for constants and parameter numbers.
    attributes: the text after the operands.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    @property
    def array(self) -> Array:
        """The result, where it is one array."""
        assert len(self.arrays) == 1, f"{self.name} has {len(self.arrays)} arrays"
        return self.arrays[0]

    @cached_property
    def op_name(self) -> str:
        """Where the traced program had it: "jit(step)/while/body/dot_general"; empty where XLA made it."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""

    @property
    def estimated_cycles(self) -> int | None:
        """libtpu's estimate of one execution; None without one, as for collectives and custom calls."""
        found = re.search(r'"estimated_cycles":"(-?\d+)"', self.attributes)
        cycles = int(found[1]) if found else NO_ESTIMATE
        return None if cycles == NO_ESTIMATE else cycles

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that it names, in the order of its text: calls, bodies, conditions, branches."""
        text = self.attributes.split(", metadata={", 1)[0]
        names: list[str] = []
        for one, several in re.findall(
            r"(?:calls|to_apply|body|condition|true_computation|false_computation)=(%?[\w.\-]+)"
            r"|(?:branch_computations|called_computations)=\{([^}]*)\}",
            text,
        ):
            names += [one] if one else several.split(",")
        return tuple(name.strip().removeprefix("%") for name in names)

    def attribute(self, name: str) -> str | None:
        """The text of attribute `name`: braces, brackets and quotes are kept together."""
        found = re.search(rf"(?:^|[,\s]){re.escape(name)}=", self.attributes)
        if found is None:
            return None
        return self.attributes[found.end() : _end_of_value(self.attributes, found.end())]

    @property
    def custom_call_target(self) -> str:
        return (self.attribute("custom_call_target") or "").strip('"')


@dataclass(frozen=True)
class Computation:
    """A named list of instructions, in the order in which a scheduled module executes them."""

    name: str
    instructions: tuple[Instruction, ...]
    by_name: Mapping[str, Instruction] = field(repr=False)

    @property
    def root(self) -> Instruction:
        return next(one for one in self.instructions if one.is_root)

    def operand(self, instruction: Instruction, position: int) -> Instruction:
        return self.by_name[instruction.operands[position]]

    def parameter(self, number: int) -> Instruction:
        return next(
            one for one in self.instructions if one.opcode == "parameter" and one.literal == str(number)
        )


@dataclass(frozen=True)
class Module:
    """A module. header: the first line, where aliasing, layouts and the number of partitions are written."""

    name: str
    header: str
    entry: Computation
    computations: Mapping[str, Computation]

    @property
    def num_partitions(self) -> int:
        found = re.search(r"num_partitions=(\d+)", self.header)
        return int(found[1]) if found else 1

    @cached_property
    def aliased_parameters(self) -> tuple[int, ...]:
        """Parameters of ENTRY whose memory an output takes over."""
        return self._header_parameters("input_output_alias", r"\(\s*(\d+)\s*,")

    @cached_property
    def donated_parameters(self) -> tuple[int, ...]:
        """Parameters whose memory the program may use for anything, beside the aliased ones."""
        return self._header_parameters("buffer_donor", r"\(\s*(\d+)\s*,")

    def _header_parameters(self, attribute: str, pattern: str) -> tuple[int, ...]:
        start = self.header.find(f"{attribute}=")
        if start < 0:
            return ()
        start += len(attribute) + 1
        value = self.header[start : _end_of_value(self.header, start)]
        return tuple(sorted({int(number) for number in re.findall(pattern, value)}))


def parse_module(text: str) -> Module:
    """Read a module. Raises HloTextError with the line for text that is none."""
    header = text.split("\n", 1)[0]
    named = re.match(r"HloModule ([^\s,]+)", header)
    if named is None:
        raise HloTextError(f"not an HLO module: it starts with {header[:80]!r}")
    computations: dict[str, Computation] = {}
    entry = None
    for is_entry, computation in _computations(text):
        computations[computation.name] = computation
        entry = computation if is_entry else entry
    if entry is None:
        raise HloTextError(f"module {named[1]} has no ENTRY computation: its text is cut off")
    return Module(named[1], header, entry, computations)


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")


def _computations(text: str) -> Iterator[tuple[bool, Computation]]:
    head: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.split("\n")[1:]:
        if head is None:
            head = _HEAD.match(line)
        elif line.startswith("}"):
            instructions = tuple(_instruction(one) for one in lines)
            names = {one.name: one for one in instructions}
            yield bool(head[1]), Computation(head[2], instructions, names)
            head, lines = None, []
        elif line.strip():
            lines.append(line)
    if head is not None:
        raise HloTextError(f"computation {head[2]} has no end: its text is cut off")


_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")


def _instruction(line: str) -> Instruction:
    start = _LINE.match(line)
    if start is None:
        raise HloTextError(f"not an HLO instruction: {line.strip()[:120]!r}")
    shape_end = _end_of_shape(line, start.end())
    opcode = _OPCODE.match(line, shape_end)
    if opcode is None:
        raise HloTextError(f"no operation in the HLO instruction {line.strip()[:120]!r}")
    operands_end = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : operands_end]
    return Instruction(
        name=start[2],
        opcode=opcode[1],
        arrays=arrays_of(line[start.end() : shape_end]),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)) if opcode[1] != "constant" else (),
        literal=inside,
        attributes=line[operands_end + 1 :],
        is_root=bool(start[1]),
    )


def arrays_of(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape's text, `(f32[2,3]{1,0:T(8,128)S(1)}, u32[])`, flattened."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        if dtype not in _DTYPE_BITS:
            raise HloTextError(f"unknown element type {dtype!r} in the shape {shape[:80]!r}")
        # A bounded dynamic size is printed as `<=8`.
        sizes = tuple(int(size.strip().removeprefix("<=")) for size in dims.split(",") if size.strip())
        space = _SPACE.search(layout)
        found.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def _end_of_shape(line: str, start: int) -> int:
    """Where the shape at `start` ends: a tuple at its closing parenthesis, an array at the next space."""
    return _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)


_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{}]')


def _closing(text: str, start: int) -> int:
    """Position of the bracket that closes the one at `start`; brackets in quoted text do not count."""
    depth = 0
    for found in _BRACKETS.finditer(text, start):
        if found[0] in "([{":
            depth += 1
        elif found[0] in ")]}":
            depth -= 1
            if depth == 0:
                return found.start()
    raise HloTextError(f"a bracket is not closed in {text[start : start + 80]!r}")


_VALUE_PART = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{},]')


def _end_of_value(text: str, start: int) -> int:
    """Where an attribute's value ends: at a comma outside all brackets and quotes, or with the text."""
    depth = 0
    for found in _VALUE_PART.finditer(text, start):
        if found[0] in ("(", "[", "{"):
            depth += 1
        elif found[0] in (")", "]", "}"):
            depth -= 1
            if depth < 0:
                return found.start()
        elif found[0] == "," and depth == 0:
            return found.start()
    return len(text)
