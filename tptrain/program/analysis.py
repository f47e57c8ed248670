"""What a compiled program costs: cycles, FLOPs, communication, and the score that programs are compared by.

    score = estimated cycles / clock + kernel FLOPs at half of the peak + communication that is waited for

libtpu estimates each instruction's cycles but no Pallas kernel's, no collective's and no copy's between the
memories of chip and host; hence the other two parts. An estimate, good for ranking programs under one libtpu
and one set of flags.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tptrain.chips import Chip
from tptrain.program.collectives import Network, Transfer, transfers
from tptrain.program.device_groups import MeshPlaces
from tptrain.program.flops import PALLAS_TARGET, custom_call_flops, matmul_flops
from tptrain.program.hlo_text import Computation, Instruction, Module
from tptrain.program.host_copies import host_copies, uses_host_memory
from tptrain.program.walk import Visit, Walk, fused_instructions
from tptrain.topology import Topology

# About what flash attention reaches on TPUs. With it, estimates came within -9 % to +6 % of the two published
# step times of MaxText that could be checked.
KERNEL_SHARE_OF_PEAK = 0.5


@dataclass(frozen=True)
class CollectiveUse:
    """Collectives of one kind over one axis, over a whole step; or copies to or from the host's memory.

    num_bytes:       what one chip sends, or receives from its host.
    seconds:         that at link speed; None where the network's speed has no source.
    exposed_seconds: the part that no compute runs beside.
    """

    kind: str
    network: Network
    axes: tuple[str, ...]
    group_size: int
    dtype: str
    executions: int
    num_bytes: float
    seconds: float | None
    exposed_seconds: float | None

    @property
    def exposed_bytes(self) -> float:
        """Bytes that the chip waits for; all of them where nothing is known of the time."""
        if not self.seconds or self.exposed_seconds is None:
            return self.num_bytes
        return self.num_bytes * self.exposed_seconds / self.seconds


@dataclass(frozen=True)
class KernelUse:
    """A Pallas kernel over a whole step. flops: None for one whose FLOPs are not known."""

    name: str
    executions: int
    flops: float | None


@dataclass(frozen=True)
class ProgramCost:
    """Costs of one step on one chip.

    estimated_cycles:  libtpu's estimates over what is executed, loops times their trip counts.
    matmul_cycles:     the part on instructions that hold matrix products.
    matmul_efficiency: cycles that the matrix units need at their bfloat16 peak / matmul_cycles.
    total_flops:       matrix products and kernels, of all chips together; recomputation included.
    notices:           what could not be known, as sentences.
    """

    estimated_cycles: int
    estimated_seconds: float
    matmul_flops: int
    matmul_cycles: int
    matmul_efficiency: float | None
    kernels: tuple[KernelUse, ...]
    kernel_flops: float
    kernel_seconds: float
    collectives: tuple[CollectiveUse, ...]
    communication_seconds: float
    exposed_seconds: float
    flops_per_device: float
    total_flops: float
    score_seconds: float
    notices: tuple[str, ...]


def analyse(module: Module, mesh: MeshPlaces, attention_density: float) -> ProgramCost:
    """The cost of a scheduled module, as libtpu dumps it after code generation.

    mesh: the mesh it was compiled for. attention_density: part of all (query, key) pairs that the attention
    mask leaves (0.5 for causal), for attention kernels that state no cost. Raises HloTextError for text in an
    unknown form.
    """
    return _Analysis(module, mesh, attention_density).cost()


def mfu(cost: ProgramCost, model_flops: float, topology: Topology) -> float:
    """Model FLOPs utilisation of a step as estimated: the model's own FLOPs over what the chips could do.

    model_flops: of a whole step on all chips, recomputation left out (Chowdhery et al. 2022, appendix B).
    """
    peak = topology.chip.peak_bf16_flops_per_second
    assert peak, f"{topology.name} has no peak"
    return model_flops / (cost.score_seconds * peak * topology.num_devices)


@dataclass
class _Analysis:
    """The sums over all that a module executes."""

    module: Module
    mesh: MeshPlaces
    attention_density: float
    notices: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.walk = Walk(self.module)
        self.speed = _Speed.of(self.mesh.topology.chip)

    def cost(self) -> ProgramCost:
        visits = list(self.walk.visits())
        cycles = sum(visit.times * _own_cycles(visit) for visit in visits)
        flops, matmul_cycles, estimated_flops = self._matmuls(visits)
        kernels = self._kernels(visits)
        kernel_flops = sum(kernel.flops or 0.0 for kernel in kernels)
        collectives = _merged(use for visit in visits for use in self._collectives(visit))
        exposed = sum(use.exposed_seconds or 0.0 for use in collectives)
        seconds = cycles / self.speed.cycles_per_second
        kernel_seconds = kernel_flops / self.speed.kernel_flops_per_second
        ideal = estimated_flops / self.speed.flops_per_cycle
        self._check(kernels, collectives)
        return ProgramCost(
            estimated_cycles=cycles,
            estimated_seconds=seconds,
            matmul_flops=flops,
            matmul_cycles=matmul_cycles,
            matmul_efficiency=ideal / matmul_cycles if matmul_cycles else None,
            kernels=kernels,
            kernel_flops=kernel_flops,
            kernel_seconds=kernel_seconds,
            collectives=collectives,
            communication_seconds=sum(use.seconds or 0.0 for use in collectives),
            exposed_seconds=exposed,
            flops_per_device=flops + kernel_flops,
            total_flops=(flops + kernel_flops) * self.mesh.topology.num_devices,
            score_seconds=seconds + kernel_seconds + exposed,
            notices=(*self.walk.notices, *self.notices),
        )

    def _matmuls(self, visits: list[Visit]) -> tuple[int, int, int]:
        """FLOPs of all matrix products; the cycles of the instructions that hold them; FLOPs of those."""
        flops = cycles = estimated = 0
        for visit in visits:
            for instruction in visit.computation.instructions:
                inside = self._matmul_flops(visit.computation, instruction)
                flops += visit.times * inside
                if inside and instruction.estimated_cycles is not None:
                    cycles += visit.times * instruction.estimated_cycles
                    estimated += visit.times * inside
        return flops, cycles, estimated

    def _matmul_flops(self, computation: Computation, instruction: Instruction) -> int:
        fused = fused_instructions(self.module, computation, instruction)
        return sum(matmul_flops(home, one) for home, one in fused)

    def _kernels(self, visits: list[Visit]) -> tuple[KernelUse, ...]:
        """Pallas kernels by name, the most expensive first."""
        uses: dict[str, KernelUse] = {}
        for visit in visits:
            for one in visit.computation.instructions:
                if not _is_kernel(one):
                    continue
                flops = custom_call_flops(visit.computation, one, self.attention_density)
                name = _kernel_name(one)
                known = uses.get(name, KernelUse(name, 0, 0.0))
                total = None if flops is None or known.flops is None else known.flops + visit.times * flops
                uses[name] = KernelUse(name, known.executions + visit.times, total)
        return tuple(sorted(uses.values(), key=lambda use: -(use.flops or 0.0)))

    def _seconds(self, visit: Visit) -> list[float]:
        """Compute seconds of each instruction of a visit, with what it executes in turn."""
        position = {one.name: i for i, one in enumerate(visit.computation.instructions)}
        seconds = [self._own_seconds(visit.computation, one) for one in visit.computation.instructions]
        for child in visit.children:
            seconds[position[child.instruction.name]] += child.times * sum(self._seconds(child.visit))
        return seconds

    def _own_seconds(self, computation: Computation, instruction: Instruction) -> float:
        seconds = (instruction.estimated_cycles or 0) / self.speed.cycles_per_second
        if _is_kernel(instruction):
            flops = custom_call_flops(computation, instruction, self.attention_density) or 0.0
            seconds += flops / self.speed.kernel_flops_per_second
        return seconds

    def _collectives(self, visit: Visit) -> Iterator[CollectiveUse]:
        found = [
            *transfers(self.module, visit.computation, self.mesh),
            *host_copies(self.module, visit.computation, self.mesh.topology.chip),
        ]
        hidden = hidden_seconds(found, self._seconds(visit)) if found else []
        for transfer, beside in zip(found, hidden, strict=True):
            seconds = None if transfer.seconds is None else visit.times * transfer.seconds
            exposed = None if seconds is None else max(0.0, seconds - visit.times * beside)
            yield CollectiveUse(
                kind=transfer.kind,
                network=transfer.network,
                axes=transfer.axes,
                group_size=transfer.group_size,
                dtype=transfer.dtype,
                executions=visit.times,
                num_bytes=visit.times * transfer.num_bytes,
                seconds=seconds,
                exposed_seconds=exposed,
            )

    def _check(self, kernels: tuple[KernelUse, ...], collectives: tuple[CollectiveUse, ...]) -> None:
        """Say what the sums leave out."""
        for kernel in kernels:
            if kernel.flops is None:
                self.notices.append(f"the kernel {kernel.name} states no FLOPs and counts as none")
        copied = any(use.network == "PCIe" for use in collectives)
        if not copied and uses_host_memory([visit.computation for visit in self.walk.visits()]):
            self.notices.append("copies to and from the host's memory are in no known form and count as none")
        if any(use.seconds is None for use in collectives if use.network == "DCN"):
            chip = self.mesh.topology.chip.name
            self.notices.append(
                f"the speed of {chip}'s data centre network is not known: its use counts as none"
            )


@dataclass(frozen=True)
class _Speed:
    """A chip's speeds, all of them known."""

    cycles_per_second: float
    flops_per_cycle: int
    kernel_flops_per_second: float

    @staticmethod
    def of(chip: Chip) -> _Speed:
        clock, mxu, peak = chip.clock_hertz, chip.mxu_flops_per_cycle, chip.peak_bf16_flops_per_second
        assert clock and mxu and peak, f"{chip.name} is no TPU: there is nothing to compile for"
        return _Speed(clock, mxu, KERNEL_SHARE_OF_PEAK * peak)


def hidden_seconds(found: list[Transfer], compute_seconds: list[float]) -> list[float]:
    """Compute that runs beside each transfer: what stands between its start and its end.

    compute_seconds: of each instruction of the computation. It is divided equally among the transfers under
    way that share a route, because each of them slows the others down.
    """
    hidden = [0.0] * len(found)
    for position, seconds in enumerate(compute_seconds):
        under_way = [i for i, one in enumerate(found) if one.start < position < one.end] if seconds else []
        sharing = Counter(found[i].route for i in under_way)
        for i in under_way:
            hidden[i] += seconds / sharing[found[i].route]
    return hidden


def _own_cycles(visit: Visit) -> int:
    return sum(one.estimated_cycles or 0 for one in visit.computation.instructions)


def _is_kernel(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and instruction.custom_call_target == PALLAS_TARGET


def _kernel_name(instruction: Instruction) -> str:
    """The kernel's name without XLA's number and its block sizes: "splash_mha_dkv"."""
    path = [part for part in instruction.op_name.split("/") if part != "pallas_call"]
    unnamed = instruction.name.startswith("custom-call") and path
    name = path[-1] if unnamed else re.sub(r"(\.clone|\.\d+)+$", "", instruction.name)
    return name.split("_block_")[0]


def _merged(uses: Iterator[CollectiveUse]) -> tuple[CollectiveUse, ...]:
    """Uses of one kind, network, axis and type added up; the longest first."""
    merged: dict[tuple[object, ...], CollectiveUse] = {}
    for use in uses:
        key = (use.kind, use.network, use.axes, use.group_size, use.dtype)
        before = merged.get(key)
        merged[key] = use if before is None else _added(before, use)
    return tuple(sorted(merged.values(), key=lambda use: -(use.seconds or 0.0)))


def _added(a: CollectiveUse, b: CollectiveUse) -> CollectiveUse:
    def total(x: float | None, y: float | None) -> float | None:
        return None if x is None or y is None else x + y

    return dataclasses.replace(
        a,
        executions=a.executions + b.executions,
        num_bytes=a.num_bytes + b.num_bytes,
        seconds=total(a.seconds, b.seconds),
        exposed_seconds=total(a.exposed_seconds, b.exposed_seconds),
    )
