"""How often a `while` of an HLO module runs, found by running its counter.

libtpu leaves no trip count in its text, and a 64-bit counter has become two 32-bit words whose carry is added
by hand. So nothing is matched against a pattern: the scalars that decide the condition are evaluated, from
the loop's initial value and through its body, until the condition is false.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from tptrain.program.hlo_text import Array, Computation, Instruction, Module

# Which part of a nested tuple is meant: (2,) is element 2, () the value itself.
Path = tuple[int, ...]
# The value of a part of a computation's parameter.
Arguments = Callable[[int, Path], int]

_MOST_TRIPS = 100_000

_BINARY: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "minimum": min,
    "maximum": max,
    "shift-left": operator.lshift,
    "shift-right-logical": operator.rshift,
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
# Operations that hand a scalar on as it is; convert and bitcast-convert wrap it to their own width.
_SAME = frozenset(
    {
        *("copy", "copy-done", "bitcast", "reshape", "broadcast"),
        *("convert", "bitcast-convert", "optimization-barrier"),
    }
)


class UnknownTripCount(Exception):
    """A loop whose condition does not follow from constants; the message says where that was found."""


def no_arguments(number: int, path: Path) -> int:
    """The arguments of ENTRY: nothing is known of them."""
    raise UnknownTripCount(f"it depends on parameter {number} of the program")


@dataclass(frozen=True)
class Scalars:
    """Evaluates scalars of a module.

    module: the module whose computations are called.
    """

    module: Module

    def value(self, computation: Computation, name: str, path: Path, arguments: Arguments) -> int:
        """The integer at `path` of instruction `name`. Raises UnknownTripCount where it is not constant."""
        instruction = computation.by_name[name]
        opcode = instruction.opcode

        def operand(position: int, at: Path = ()) -> int:
            return self.value(computation, instruction.operands[position], at, arguments)

        if opcode == "parameter":
            return arguments(int(instruction.literal), path)
        if opcode == "constant":
            return _constant(instruction)
        if opcode == "get-tuple-element":
            return operand(0, (int(instruction.attribute("index") or 0), *path))
        if opcode == "tuple":
            return operand(path[0], path[1:])
        if opcode == "copy-start":
            return operand(0)
        if opcode in ("fusion", "call"):
            callee = self.module.computations[instruction.called[0]]
            return self.value(callee, callee.root.name, path, operand)
        if opcode == "while":
            return self._unchanged_by(instruction, path, operand)
        if opcode in _SAME:
            return _wrapped(operand(0, path), instruction.arrays)
        return _wrapped(_computed(instruction, operand), instruction.arrays)

    def _unchanged_by(self, loop: Instruction, path: Path, operand: Callable[[int, Path], int]) -> int:
        """A part of a loop's result that the loop hands on unchanged."""
        if not self.is_invariant(self.module.computations[_named(loop, "body")], path):
            raise UnknownTripCount(f"it depends on what the loop {loop.name} computes")
        return operand(0, path)

    def is_invariant(self, body: Computation, path: Path) -> bool:
        """Whether a loop's body hands that part of its state on as it came."""
        name, at = body.root.name, path
        while True:
            instruction = body.by_name[name]
            if instruction.opcode == "tuple" and at:
                name, at = instruction.operands[at[0]], at[1:]
            elif instruction.opcode == "get-tuple-element":
                name, at = instruction.operands[0], (int(instruction.attribute("index") or 0), *at)
            elif instruction.opcode == "copy":
                name = instruction.operands[0]
            else:
                return instruction.opcode == "parameter" and at == path


def loop_parts(module: Module, loop: Instruction) -> tuple[Computation, Computation]:
    """The condition and the body of a `while`."""
    return module.computations[_named(loop, "condition")], module.computations[_named(loop, "body")]


def trip_count(module: Module, computation: Computation, loop: Instruction, arguments: Arguments) -> int:
    """How often the body of `loop`, an instruction of `computation`, runs.

    arguments: values of the computation's parameters. Raises UnknownTripCount.
    """
    scalars = Scalars(module)
    condition, body = loop_parts(module, loop)
    state: dict[Path, int] = {}

    def current(number: int, path: Path) -> int:
        if path not in state:
            state[path] = scalars.value(computation, loop.operands[0], path, arguments)
        return state[path]

    def goes_on() -> bool:
        return bool(scalars.value(condition, condition.root.name, (), current))

    def next_state() -> dict[Path, int]:
        return {path: scalars.value(body, body.root.name, path, current) for path in list(state)}

    goes_on()
    # What the condition reads may depend on more parts of the state: all are found before the first round.
    known = -1
    while known != len(state):
        known = len(state)
        next_state()
    trips = 0
    while goes_on():
        before, state = state, next_state()
        trips += 1
        if state == before:
            raise UnknownTripCount("it never ends")
        if trips > _MOST_TRIPS:
            raise UnknownTripCount(f"it runs more than {_MOST_TRIPS:,} times")
    return trips


def body_arguments(
    module: Module, computation: Computation, loop: Instruction, outer: Arguments
) -> Arguments:
    """The arguments of a loop's body: known where no round changes them."""
    scalars = Scalars(module)
    _, body = loop_parts(module, loop)

    def known(number: int, path: Path) -> int:
        if not scalars.is_invariant(body, path):
            raise UnknownTripCount(f"it depends on element {path} of {loop.name}, which changes")
        return scalars.value(computation, loop.operands[0], path, outer)

    return known


def call_arguments(
    module: Module, computation: Computation, call: Instruction, outer: Arguments
) -> Arguments:
    """The arguments of a called computation: the operands of the call."""
    scalars = Scalars(module)

    def known(number: int, path: Path) -> int:
        return scalars.value(computation, call.operands[number], path, outer)

    return known


def _named(loop: Instruction, attribute: str) -> str:
    text = loop.attribute(attribute)
    assert text is not None, f"{loop.name} has no {attribute}"
    return text.removeprefix("%")


def _constant(instruction: Instruction) -> int:
    text = instruction.literal.strip()
    if text in ("true", "false"):
        return int(text == "true")
    if re.fullmatch(r"-?\d+", text) is None:
        raise UnknownTripCount(f"it depends on the constant {instruction.name}, which is no whole number")
    return int(text)


def _computed(instruction: Instruction, operand: Callable[[int], int]) -> int:
    opcode = instruction.opcode
    if opcode == "compare":
        return int(_COMPARE[instruction.attribute("direction") or ""](operand(0), operand(1)))
    if opcode == "select":
        choice, if_true, if_false = operand(0), operand(1), operand(2)
        return if_true if choice else if_false
    if opcode == "not":
        return ~operand(0)
    if opcode in _BINARY:
        return _BINARY[opcode](operand(0), operand(1))
    raise UnknownTripCount(f"it depends on {instruction.name}, a {opcode}")


def _wrapped(value: int, arrays: tuple[Array, ...]) -> int:
    """The value in the range of the result's integer type."""
    dtype = arrays[0].dtype if arrays else ""
    if dtype == "pred":
        return value & 1
    found = re.fullmatch(r"([su])(\d+)", dtype)
    if found is None:
        raise UnknownTripCount(f"it depends on a {dtype} number")
    bits = int(found[2])
    value &= (1 << bits) - 1
    return value - (1 << bits) if found[1] == "s" and value >> (bits - 1) else value
