"""Bytes of a chip's memory that a train step needs, part by part.

What a step is given and gives back (its arguments: weights, optimizer state, batch) is exact. What it needs
in between (its temporaries) is the largest of a few phases, each a sum of parts whose shapes are known. What
the compiler decides beside that is in `Fitted`.

Assumed of the program, as XLA compiles the step of `tptrain.train.step`:
- state is updated in place; micro-batches run one after the other;
- the cast of the stacked layers to the compute format leaves the loop: one such copy of every shard lives
  through the step;
- gradients are in the compute format, and are split like their parameters once a layer is done; sums over
  micro-batches are in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from tptrain.estimate.activations import (
    forward_bytes,
    in_flight_bytes,
    kept_bytes,
    logits_bytes,
    shared_bytes,
    stream_bytes,
)
from tptrain.estimate.workload import Workload
from tptrain.family import ParamRow
from tptrain.family.table import DTYPE_BYTES

Verdict = Literal["fits", "tight", "does not fit", "no limit"]

# Tokens, targets, weights, positions and segment ids: 4 bytes each.
_BATCH_BYTES_PER_TOKEN = 5 * 4
_SUM_BYTES = DTYPE_BYTES["float32"]
_UNREDUCED = "gradients before their reduction"


@dataclass(frozen=True)
class Fitted:
    """What only the compiler knows, as numbers that can be fitted to its own reports.

    logits_copies:   logits and whatever has their shape, in units of the logits in the compute format, while
                     their gradient is made by autograd, before that of the head is there.
    chunk_logits:    the same with the loss in several chunks, where the head's gradient is always there.
    stream_copies:   activations [B, T, D] around the loss: input and output of the last norm, a gradient.
    gathered:        collected matrices of a layer that exist at a time, in units of the largest: the one in
                     use and the one on its way.
    in_flight:       activations and their gradients in the backward pass of a layer, over what its operations
                     read and write: copies in another layout, and a splash kernel's residuals, which have 128
                     lanes for every number.
    one_row_scores:  copies of the plain core's scores, in the compute format, while the backward pass of a
                     layer makes their gradient, for one row on a device. Seen: 3 in bfloat16.
    scores_bytes:    bytes of each score at that time for several rows on a device: the compiler then writes
                     the softmax in float32 as well. Seen: three copies in float32 and two in bfloat16.
    temporaries:     temporaries over the sum of the parts of the largest phase.
    """

    logits_copies: float = 2.0
    chunk_logits: float = 1.0
    stream_copies: float = 3.0
    gathered: float = 2.0
    in_flight: float = 1.35
    one_row_scores: float = 3.0
    scores_bytes: float = 16.0
    temporaries: float = 1.0


FITTED = Fitted()

# A program is said to fit when so much of its estimate is left of the memory.
MARGIN = 0.10


@dataclass(frozen=True)
class Phase:
    """A time within the step and the bytes of each thing that lives then."""

    name: str
    parts: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """Bytes of one chip.

    arguments: what the step is given, by name. phases: what lives in between, at different times.
    factor:    of the compiler, on the largest phase.
    """

    arguments: Mapping[str, int]
    phases: tuple[Phase, ...]
    factor: float

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total_bytes)

    @property
    def argument_bytes(self) -> int:
        return sum(self.arguments.values())

    @property
    def temporary_bytes(self) -> int:
        return round(self.factor * self.peak.total_bytes)

    @property
    def total_bytes(self) -> int:
        return self.argument_bytes + self.temporary_bytes


def verdict(total_bytes: int, hbm_bytes: int | None, margin: float = MARGIN) -> Verdict:
    """What to say of a program of that size on a chip that lets it use `hbm_bytes`; None: no such limit."""
    if hbm_bytes is None:
        return "no limit"
    if total_bytes > hbm_bytes:
        return "does not fit"
    return "tight" if total_bytes * (1 + margin) > hbm_bytes else "fits"


def memory(work: Workload, fitted: Fitted = FITTED) -> Memory:
    """The memory of one chip."""
    arguments = {
        "parameters": sum(_stored_bytes(row, work) for row in work.table),
        "optimizer state": work.optimizer_bytes,
        "batch": work.micro_batches * work.device_tokens * _BATCH_BYTES_PER_TOKEN,
    }
    return Memory(arguments, _phases(work, fitted), fitted.temporaries)


def _phases(work: Workload, fitted: Fitted) -> tuple[Phase, ...]:
    """The times at which a program may be at its largest, in their order within a micro-batch."""
    trained, width = _trained(work.table), work.compute_bytes
    sums = {"gradient sums": _local(trained, work) * _SUM_BYTES} if work.micro_batches > 1 else {}
    gradients = {"gradients": _local(trained, work) * width}
    in_layers = {
        **sums,
        "cast weights": sum(_cast_bytes(row, work) for row in work.layer_rows),
        "kept activations": kept_bytes(work),
        "masks and rotary tables": shared_bytes(work),
    }
    of_embedding = {**sums, **gradients, "activations in flight": 2 * stream_bytes(work)}
    return (
        *_loss_phases(work, fitted, in_layers),
        _layer_phase(work, fitted, in_layers),
        *([Phase("gradient of the embedding", of_embedding)] if work.embedding.trainable else []),
        Phase("update", sums or gradients),
    )


def _loss_phases(work: Workload, fitted: Fitted, in_layers: Mapping[str, int]) -> list[Phase]:
    """Around the head. The loss by autograd has two phases; with chunks, gradients are made along with it.

    Several chunks sum the head's gradient in float32 while logits come and go.
    """
    around = {
        **in_layers,
        "gathered weights": _used_bytes(work.head, work),
        "activations in flight": round(fitted.stream_copies * stream_bytes(work)),
    }
    logits, head = logits_bytes(work), _gathered(_trained([work.head]), work)
    whole = Phase("gradient of the head", {**around, "logits": logits, _UNREDUCED: head * work.compute_bytes})
    if work.loss_chunk_tokens is None:
        return [Phase("loss", {**around, "logits": round(fitted.logits_copies * logits)}), whole]
    if work.loss_chunk_tokens >= work.tokens:
        return [whole]
    sums = {_UNREDUCED: head * (_SUM_BYTES + work.compute_bytes)}
    return [Phase("loss", {**around, "logits": round(fitted.chunk_logits * logits), **sums})]


def _layer_phase(work: Workload, fitted: Fitted, in_layers: Mapping[str, int]) -> Phase:
    """The layers at their largest: their backward pass, or the forward pass where none goes back.

    The forward pass is taken to need as much for each score as the backward pass does, so that its estimate
    is rather too large.
    """
    scores = _bytes_per_score(work, fitted)
    gathered = {"gathered weights": round(fitted.gathered * _largest(work.layer_rows, work))}
    if not work.back_layers:
        flying = {"activations in flight": round(fitted.in_flight * forward_bytes(work, scores))}
        return Phase("forward pass of the layers", {**in_layers, **gathered, **flying})
    done = _trained({row.name: row for row in (*work.layer_rows, work.head)}.values())
    parts = {
        **gathered,
        "activations in flight": round(fitted.in_flight * in_flight_bytes(work, scores)),
        _UNREDUCED: _largest(_trained(work.layer_rows), work),
        "gradients": _local(done, work) * work.compute_bytes,
    }
    return Phase("backward pass of the layers", {**in_layers, **parts})


def _largest(rows: Iterable[ParamRow], work: Workload) -> int:
    """Bytes of the largest row as a device computes with it."""
    return max((work.gathered_elements(row) for row in rows), default=0) * work.compute_bytes


def _bytes_per_score(work: Workload, fitted: Fitted) -> float:
    if work.device_tokens == work.tokens or work.compute_bytes >= _SUM_BYTES:
        return fitted.one_row_scores * work.compute_bytes
    return fitted.scores_bytes


def _trained(rows: Iterable[ParamRow]) -> list[ParamRow]:
    return [row for row in rows if row.trainable]


def _local(rows: Iterable[ParamRow], work: Workload) -> int:
    return sum(work.local_elements(row) for row in rows)


def _gathered(rows: Iterable[ParamRow], work: Workload) -> int:
    return sum(work.gathered_elements(row) for row in rows)


def _stored_bytes(row: ParamRow, work: Workload) -> int:
    return work.local_elements(row) * DTYPE_BYTES[row.storage_dtype]


def _cast_bytes(row: ParamRow, work: Workload) -> int:
    """Bytes of a device's own copy of its piece in the compute format; none where it is stored in it."""
    return 0 if row.storage_dtype == work.compute else work.local_elements(row) * work.compute_bytes


def _used_bytes(row: ParamRow, work: Workload) -> int:
    """Bytes of the whole row as the step computes with it; none where that is the stored piece itself."""
    is_stored = row.storage_dtype == work.compute and not work.gather_axes(row)
    return 0 if is_stored else work.gathered_elements(row) * work.compute_bytes
