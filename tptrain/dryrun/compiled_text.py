"""What XLA's dump says of a compile, added to its outcome."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from tptrain.program.analysis import analyse
from tptrain.program.buffers import HbmUse, OutOfMemory, hbm_use, out_of_memory
from tptrain.program.compiled import CompiledProgram
from tptrain.program.device_groups import MeshPlaces
from tptrain.program.hlo_text import HloTextError, Module, parse_module

_GIB = 2**30
_REASON_LENGTH = 800


@dataclass(frozen=True)
class Dump:
    """XLA's dump of one compile, and what is known of the program beside it.

    parameter_names: of the program's parameters, in order. attention_density: see `analyse`.
    """

    folder: Path
    mesh: MeshPlaces
    attention_density: float
    parameter_names: tuple[str, ...]

    def add_to(self, program: CompiledProgram) -> CompiledProgram:
        """The outcome with costs and the largest buffers; for a program too large for HBM, with its sizes.

        Text in an unknown form leaves a notice; the outcome stays what it is.
        """
        if program.outcome == "refused":
            return self._refused(program)
        try:
            module = parse_module(self._text("after_codegen.txt"))
            cost = analyse(module, self.mesh, self.attention_density)
            use = self._hbm_use(module)
        # libtpu's text is no stable format: whatever it does to a reader, the program did compile.
        except (HloTextError, LookupError, ValueError, AssertionError) as error:
            return _noted(program, f"the text of the compiled program could not be read: {error!r}")
        assert program.memory is not None
        return replace(
            program,
            # Statistics of 0.0.21 count code as well, and twice what lives through a call.
            memory=replace(program.memory, temporary_bytes=use.temporary_bytes),
            cost=cost,
            aliased_parameters=module.aliased_parameters,
            donated_parameters=module.donated_parameters,
            largest_buffers=use.largest,
        )

    def _refused(self, program: CompiledProgram) -> CompiledProgram:
        shortage = out_of_memory(program.message)
        if shortage is None:
            return replace(program, message=self._mended(program.message))
        try:
            use = self._hbm_use(self._optimised_module())
        except (HloTextError, LookupError, ValueError, AssertionError) as error:
            program = _noted(program, f"the text of the program could not be read: {error!r}")
            use = HbmUse(0, 0, ())
        # libtpu's message may leave out the arguments, and rounds to 0.01 GiB.
        shortage = OutOfMemory(max(shortage.needed_bytes, use.total_bytes), shortage.available_bytes)
        needed, available = shortage.needed_bytes / _GIB, shortage.available_bytes / _GIB
        message = f"the program needs {needed:.2f} GiB of HBM on each chip; {available:.2f} GiB are available"
        return replace(
            program, outcome="out_of_memory", message=message, shortage=shortage, largest_buffers=use.largest
        )

    def _mended(self, message: str) -> str:
        """The compiler's refusal in short, where it is about the name of a flag."""
        unknown = re.search(r"No such compile option: '?([\w.]+)'?", message)
        if unknown is None:
            # A whole module may be printed after the reason.
            end = " ..." if len(message) > _REASON_LENGTH else ""
            return f"the compiler refuses the program: {message[:_REASON_LENGTH].rstrip()}{end}"
        return f"this compiler knows no flag {unknown[1]!r}: remove it, or use a libtpu that has it"

    def _hbm_use(self, module: Module | None) -> HbmUse:
        return hbm_use(self._text("buffer-assignment.txt"), module, self.parameter_names)

    def _optimised_module(self) -> Module | None:
        """The program as it was before it turned out too large."""
        text = self._text("after_optimizations.txt")
        return parse_module(text) if text else None

    def _text(self, ending: str) -> str:
        """The dumped file with that ending; the largest where XLA compiled helpers too; empty without one."""
        paths = sorted(self.folder.glob(f"*{ending}"), key=lambda path: path.stat().st_size)
        return paths[-1].read_text(errors="replace") if paths else ""


def _noted(program: CompiledProgram, notice: str) -> CompiledProgram:
    return replace(program, notices=(*program.notices, notice))
