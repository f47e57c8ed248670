"""What the chips of a mesh send each other in one train step: by kind, axis and network, with bytes.

Bytes are those that one chip receives. With n devices on an axis, i of them in a slice and d slices:

    all-gather      (i - 1) / i of the result over ICI, after (d - 1) / d of its 1 / i over DCN
    reduce-scatter  the same, of what goes in
    all-reduce      both: twice as much
    all-to-all      (i - 1) / i of what a chip has over ICI, (d - 1) / d of it over DCN

The embedding is not collected: each device looks tokens of all of them up in the columns that it has, and
the results are exchanged (seen in programs of libtpu 0.0.24).

Left out: scalars (loss, gradient norm), and the partial sums of a softmax over a split vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from tptrain.config.remat import KEPT
from tptrain.estimate.activations import stream_bytes
from tptrain.estimate.workload import Workload
from tptrain.family import ParamRow
from tptrain.mesh import AXES, MeshShape

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]
Network = Literal["ICI", "DCN"]


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind and purpose along one axis, over one network, in one step.

    count: how many there are. received_bytes: by one chip, all of them together.
    """

    kind: Kind
    axis: str
    network: Network
    what: str
    count: int
    received_bytes: int


@dataclass(frozen=True)
class _Wanted:
    """The same before it is spread over networks. size_bytes: of what is gathered or reduced, as a whole."""

    kind: Kind
    axis: str
    what: str
    count: int
    size_bytes: int


def collectives(work: Workload, mesh: MeshShape) -> tuple[Collective, ...]:
    """The collectives of one step, those of one purpose and axis together."""
    wanted = [*_weights(work), *_gradients(work), *_activations(work)]
    return tuple(found for each in wanted if each.size_bytes for found in _spread(each, mesh))


def _spread(wanted: _Wanted, mesh: MeshShape) -> Iterator[Collective]:
    index = AXES.index(wanted.axis)
    ici, dcn = mesh.ici[index], mesh.dcn[index]
    times = 2 if wanted.kind == "all-reduce" else 1
    over_dcn = wanted.size_bytes if wanted.kind == "all-to-all" else wanted.size_bytes / ici
    networks: tuple[tuple[Network, int, float], ...] = (
        ("ICI", ici, wanted.size_bytes),
        ("DCN", dcn, over_dcn),
    )
    for network, size, through in networks:
        if size > 1:
            received = round(times * (size - 1) / size * through)
            yield Collective(wanted.kind, wanted.axis, network, wanted.what, wanted.count, received)


def _weights(work: Workload) -> Iterator[_Wanted]:
    """Rows are collected where they are used: layers in each pass through them, the head once for both."""
    uses = [
        ("layers, forward", work.layer_rows),
        ("head", [work.head]),
        ("layers, backward", work.back_rows),
    ]
    for what, rows in uses:
        for axis, (count, elements) in _gathered(rows, work).items():
            size = elements * work.compute_bytes * work.micro_batches
            yield _Wanted("all-gather", axis, f"weights: {what}", count * work.micro_batches, size)


def _gathered(rows: Iterable[ParamRow], work: Workload) -> dict[str, tuple[int, int]]:
    """Axis -> (rows that are collected over it, their numbers on a chip when they are)."""
    found: dict[str, tuple[int, int]] = {}
    for row in rows:
        for axis, gathered in work.gathered_over(row).items():
            count, elements = found.get(axis, (0, 0))
            found[axis] = (count + 1, elements + gathered)
    return found


def _gradients(work: Workload) -> Iterator[_Wanted]:
    """A batch axis that splits a row scatters its gradient; one that does not sums what is left of it."""
    batch = [axis for axis in work.rules.acts["act_batch"] or () if work.axis_sizes[axis] > 1]
    trained = [row for row in work.table if row.trainable]
    for axis in batch:
        split = [row for row in trained if axis in work.gather_axes(row) and _is_collected(row, work)]
        whole = [row for row in trained if axis not in work.split_axes(row)]
        scattered = sum(work.gathered_over(row)[axis] for row in split)
        summed = sum(work.local_elements(row) for row in whole)
        times, width = work.micro_batches, work.compute_bytes * work.micro_batches
        yield _Wanted("reduce-scatter", axis, "gradients", len(split) * times, scattered * width)
        yield _Wanted("all-reduce", axis, "gradients", len(whole) * times, summed * width)


def _is_collected(row: ParamRow, work: Workload) -> bool:
    """Whether devices compute with the whole row: all but an embedding that is no head as well."""
    return row != work.embedding or row == work.head


def _activations(work: Workload) -> Iterator[_Wanted]:
    """What is looked up in the embedding and its gradient; and sums over split heads, MLP and vocabulary.

    Of these there are two a layer and pass (Megatron-LM, arXiv:1909.08053).
    """
    forward, back = work.facts.num_hidden_layers, work.back_layers
    for axis in work.gather_axes(work.embedding):
        count = (2 if work.embedding.trainable else 1) * work.micro_batches
        yield _Wanted("all-to-all", axis, "activations: embedding", count, count * stream_bytes(work))
    yield from _tokens_of_experts(work)
    axes = [axis for axis in work.rules.acts["act_mlp"] or () if work.axis_sizes[axis] > 1]
    uses: Mapping[str, int] = {
        "embedding, and layers forward": 1 + 2 * forward,
        "layers computed again": 0 if "after_attention" in KEPT[work.remat] else back,
        "layers backward, and head": 2 * back + 1,
    }
    for axis in axes:
        for what, times in uses.items():
            count = times * work.micro_batches
            yield _Wanted("all-reduce", axis, f"activations: {what}", count, count * stream_bytes(work))


def _tokens_of_experts(work: Workload) -> Iterator[_Wanted]:
    """Tokens go to all holders of experts, and parts of their results come back; so do gradients.

    In the backward pass tokens are collected again. What the router says of them is left out: a few numbers
    for each.
    """
    first = work.runs.first_back
    layers = [layer for layer, kind in enumerate(work.facts.layer_kinds) if kind.has_experts]
    back = sum(layer >= first for layer in layers)
    for axis in work.expert_axes:
        size = work.axis_sizes[axis] * stream_bytes(work)
        uses: tuple[tuple[Kind, str, int], ...] = (
            ("all-gather", "tokens of experts, forward", len(layers)),
            ("reduce-scatter", "tokens of experts, forward", len(layers)),
            ("all-gather", "tokens of experts, backward", 2 * back),
            ("reduce-scatter", "tokens of experts, backward", back),
        )
        for kind, what, times in uses:
            count = times * work.micro_batches
            yield _Wanted(kind, axis, what, count, count * size)
