"""The outcome of compiling a train step for a slice: data, whatever the compiler did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter

from tptrain.program.analysis import ProgramCost
from tptrain.program.buffers import Buffer, OutOfMemory

Outcome = Literal[
    "compiled",
    "out_of_memory",  # the program does not fit into HBM
    "refused",  # the compiler says that it cannot compile the program, or does not know a flag
    "no_topology",  # this libtpu cannot describe the slice
    "no_libtpu",
    "killed",  # by the system, most probably for lack of host memory
    "crashed",  # inside libtpu
    "timed_out",
]


@dataclass(frozen=True)
class Memory:
    """A compiled program, in bytes of one chip: libtpu's statistics, temporaries from its buffer assignment.

    aliased_bytes: outputs that take over the memory of arguments. host_bytes: offloaded to the host's memory.
    """

    argument_bytes: int
    output_bytes: int
    aliased_bytes: int
    temporary_bytes: int
    generated_code_bytes: int
    host_bytes: int

    @property
    def peak_bytes(self) -> int:
        """HBM that the program needs while it runs, its code left out."""
        return self.argument_bytes + self.temporary_bytes + self.output_bytes - self.aliased_bytes


@dataclass(frozen=True)
class CompiledProgram:
    """What became of one compile.

    message:    empty for a compiled program; else what is wrong and what to do, as a sentence.
    axis_sizes: mesh axis -> size.
    libtpu:     version of the package. libtpu_build: what the library says of itself, where it got to say it.
    flags:      XLA flags beside the defaults.
    peak_host_bytes: memory of the compiling process.
    memory, cost: None unless compiled. shortage: only when out of memory.
    largest_buffers: in HBM, when compiled and when out of memory.
    aliased_parameters, donated_parameters: positions among the program's parameters.
    cached:     whether this was read instead of compiled.
    """

    outcome: Outcome
    message: str
    topology: str
    axis_sizes: dict[str, int]
    libtpu: str
    libtpu_build: str
    flags: dict[str, str]
    compile_seconds: float
    peak_host_bytes: int
    memory: Memory | None = None
    shortage: OutOfMemory | None = None
    largest_buffers: tuple[Buffer, ...] = ()
    aliased_parameters: tuple[int, ...] = ()
    donated_parameters: tuple[int, ...] = ()
    cost: ProgramCost | None = None
    notices: tuple[str, ...] = ()
    cached: bool = False

    def to_json(self) -> str:
        """JSON that `from_json` reads back to an equal object."""
        return _ADAPTER.dump_json(self, indent=1).decode()

    @staticmethod
    def from_json(text: str | bytes) -> CompiledProgram:
        """Raises ValueError for JSON of anything else."""
        return _ADAPTER.validate_json(text)


_ADAPTER = TypeAdapter(CompiledProgram)
