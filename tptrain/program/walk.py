"""What a module executes: its computations with the number of times each runs.

Only ENTRY, bodies of loops, calls, branches and asynchronous computations are executed instruction by
instruction. What a fusion calls runs as one instruction, whose cost stands on the fusion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tptrain.program.hlo_text import Computation, Instruction, Module
from tptrain.program.trip_counts import (
    Arguments,
    UnknownTripCount,
    body_arguments,
    call_arguments,
    loop_parts,
    no_arguments,
    trip_count,
)


@dataclass(frozen=True)
class Visit:
    """A computation that is executed. times: how often, all loops around it multiplied."""

    computation: Computation
    times: int
    children: tuple[Child, ...]


@dataclass(frozen=True)
class Child:
    """A computation that an instruction executes, `times` for each time the instruction is."""

    instruction: Instruction
    visit: Visit
    times: int


@dataclass
class Walk:
    """The executed computations of a module.

    root:    ENTRY's visit; the others hang from it.
    notices: what could not be known, as sentences: a loop without a trip count is counted once.
    """

    module: Module
    notices: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = self._visit(self.module.entry, 1, no_arguments)

    def visits(self) -> Iterator[Visit]:
        """Every visit, a computation before those that it executes."""
        pending = [self.root]
        while pending:
            visit = pending.pop()
            yield visit
            pending += [child.visit for child in visit.children]

    def _visit(self, computation: Computation, times: int, arguments: Arguments) -> Visit:
        children = [
            child
            for instruction in computation.instructions
            for child in self._children(computation, instruction, times, arguments)
        ]
        return Visit(computation, times, tuple(children))

    def _children(
        self, computation: Computation, instruction: Instruction, times: int, arguments: Arguments
    ) -> list[Child]:
        opcode = instruction.opcode
        if opcode == "while":
            trips = self._trips(computation, instruction, arguments)
            _, body = loop_parts(self.module, instruction)
            inner = body_arguments(self.module, computation, instruction, arguments)
            return [Child(instruction, self._visit(body, times * trips, inner), trips)]
        if opcode == "conditional":
            return [self._costliest_branch(instruction, times)]
        if opcode in ("call", "async-start"):
            callee = self.module.computations[instruction.called[0]]
            inner = call_arguments(self.module, computation, instruction, arguments)
            return [Child(instruction, self._visit(callee, times, inner), 1)]
        return []

    def _costliest_branch(self, instruction: Instruction, times: int) -> Child:
        branches = [
            self._visit(self.module.computations[name], times, no_arguments) for name in instruction.called
        ]
        if len(branches) > 1:
            self.notices.append(f"of the {len(branches)} branches of {instruction.name} the costliest counts")
        return Child(instruction, max(branches, key=cycles_of), 1)

    def _trips(self, computation: Computation, loop: Instruction, arguments: Arguments) -> int:
        try:
            return trip_count(self.module, computation, loop, arguments)
        except UnknownTripCount as reason:
            self.notices.append(
                f"the loop {loop.name} is counted once: its trip count is not known, {reason}"
            )
            return 1


def cycles_of(visit: Visit) -> int:
    """Estimated cycles of one execution, with what it executes in turn."""
    own = sum(one.estimated_cycles or 0 for one in visit.computation.instructions)
    return own + sum(child.times * cycles_of(child.visit) for child in visit.children)


def fused_instructions(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """The instruction with its computation, or for a fusion all that are fused in it, at any depth."""
    if instruction.opcode != "fusion":
        yield computation, instruction
        return
    callee = module.computations[instruction.called[0]]
    for fused in callee.instructions:
        yield from fused_instructions(module, callee, fused)
