"""What one train step is to its estimates: the model's table and sizes, the split, the batch, the choices.

A `Workload` is all that the estimates of memory, communication and time read. It is made from a plan, or by
hand where a choice is to be compared that no recipe has yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tptrain.config.kernels import ExpertsCore
from tptrain.config.plan import Plan
from tptrain.config.state_parts import PARAMS
from tptrain.family import LayerRuns, ModelFacts, ParamRow, layer_of, layer_runs, stored_rows
from tptrain.family.table import DTYPE_BYTES
from tptrain.mesh import RuleTable, Spec
from tptrain.mesh.rules import split_count

Attention = Literal["plain", "splash"]

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class StateTensor:
    """A tensor of the optimizer's state. row: of the weight it belongs to, with its own sizes and format."""

    row: ParamRow
    spec: Spec


@dataclass(frozen=True)
class Workload:
    """One train step on a mesh.

    table:             the stored rows, padded for the mesh. specs: how the mesh splits them, by row name.
    optimizer:         what the optimizer keeps beside them.
    rows, tokens:      of one micro-batch: rows over all devices, and tokens of each.
    micro_batches:     of a step.
    compute:           format of activations and of weights inside the step.
    remat:             name of the remat policy. offloaded: what of it waits in the host's memory.
    attention:         "plain" keeps the scores of every pair of tokens in memory, "splash" never does.
    query_gradient_parts: how many copies of the queries' gradient a fused backward kernel writes; 0: no such.
    experts:           "grouped" computes rows of tokens and their experts, "plain" one expert after the other
                       for all tokens; None for a model without experts.
    loss_chunk_tokens: tokens of every row whose logits exist at a time, the gradients being made along with
                       the loss; None for a loss that automatic differentiation takes of all logits at once.
    """

    facts: ModelFacts
    table: tuple[ParamRow, ...]
    specs: Mapping[str, Spec]
    optimizer: tuple[StateTensor, ...]
    rules: RuleTable
    axis_sizes: Mapping[str, int]
    rows: int
    tokens: int
    micro_batches: int = 1
    compute: str = "bfloat16"
    remat: str = "full"
    offloaded: frozenset[str] = frozenset()
    attention: Attention = "plain"
    query_gradient_parts: int = 0
    experts: ExpertsCore | None = None
    loss_chunk_tokens: int | None = None

    @property
    def num_devices(self) -> int:
        return math.prod(self.axis_sizes.values())

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in the compute format."""
        return DTYPE_BYTES[self.compute]

    @property
    def period(self) -> int:
        """Layers that one turn of the longest loop runs."""
        return max(self.runs.runs, key=lambda run: len(run.layers)).period

    @cached_property
    def layer_rows(self) -> tuple[ParamRow, ...]:
        return tuple(row for row in self.table if layer_of(row.name))

    @cached_property
    def layer_rank(self) -> int:
        """The ranks of all adapters of a layer together, of the layer that has most; 0 without adapters."""
        ranks: dict[int, int] = {}
        for row in self.layer_rows:
            found = layer_of(row.name)
            if found and row.dims[0] == "rank":
                ranks[found[0]] = ranks.get(found[0], 0) + row.size[0]
        return max(ranks.values(), default=0)

    @cached_property
    def runs(self) -> LayerRuns:
        """The layers that one loop computes together."""
        return layer_runs(self.table, self.facts.layer_kinds)

    @property
    def back_turns(self) -> int:
        """Turns of the loops of the backward pass; each keeps what it was given."""
        return sum(run.turns for run in self.runs.runs if run.layers.start >= self.runs.first_back)

    @property
    def back_layers(self) -> int:
        """How many layers, from the top, the backward pass goes through; those below keep nothing for it."""
        return self.facts.num_hidden_layers - self.runs.first_back

    @cached_property
    def back_rows(self) -> tuple[ParamRow, ...]:
        """The rows of these layers, frozen ones included."""
        layers = ((row, layer_of(row.name)) for row in self.layer_rows)
        return tuple(row for row, found in layers if found and found[0] >= self.runs.first_back)

    @cached_property
    def embedding(self) -> ParamRow:
        return next(row for row in self.table if row.name == _EMBEDDING)

    @cached_property
    def head(self) -> ParamRow:
        """The row that gives the logits; the embedding where the two are tied."""
        return next((row for row in self.table if row.name == _HEAD), self.embedding)

    @property
    def device_tokens(self) -> int:
        """Tokens of one micro-batch on one device."""
        axes = [*(self.rules.acts["act_batch"] or ()), *(self.rules.acts["act_tokens"] or ())]
        return -(-self.rows * self.tokens // split_count(axes, self.axis_sizes))

    @property
    def logits_tokens(self) -> int:
        """Tokens of one device whose logits exist at a time."""
        chunk = self.tokens if self.loss_chunk_tokens is None else self.loss_chunk_tokens
        return self.device_tokens * chunk // self.tokens

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state on one device."""
        return sum(
            math.prod(each.row.padded_size)
            * DTYPE_BYTES[each.row.storage_dtype]
            // split_count([axis for axes in each.spec for axis in axes], self.axis_sizes)
            for each in self.optimizer
        )

    def used_elements(self, row: ParamRow) -> int:
        """Numbers of a row that each token is multiplied with: of experts those of the chosen ones."""
        experts = self.facts.experts
        if experts is None or not row.is_in_slices:
            return row.num_elements
        return row.num_elements * experts.num_experts_per_tok // experts.num_experts

    @property
    def expert_axes(self) -> list[str]:
        """The axes of size above 1 that split the experts."""
        return [axis for axis in self.rules.params["experts"] or () if self.axis_sizes[axis] > 1]

    def split_axes(self, row: ParamRow) -> list[str]:
        """The axes of size above 1 that split a row."""
        return [axis for axes in self.specs[row.name] for axis in axes if self.axis_sizes[axis] > 1]

    def gather_axes(self, row: ParamRow) -> list[str]:
        """Those of them that split the batch, too: the row is collected over them before it is used.

        Not over those that split experts: there the tokens are collected.
        """
        batch = self.rules.acts["act_batch"] or ()
        apart = self.expert_axes if row.is_in_slices else []
        return [axis for axis in self.split_axes(row) if axis in batch and axis not in apart]

    def gathered_over(self, row: ParamRow) -> dict[str, int]:
        """Axis that a row is collected over -> its numbers that a device has then; inner axes come first."""
        elements, found = self.local_elements(row), {}
        for axis in reversed(self.gather_axes(row)):
            elements *= self.axis_sizes[axis]
            found[axis] = elements
        return found

    def local_elements(self, row: ParamRow) -> int:
        """Numbers of a row that one device keeps."""
        return math.prod(row.padded_size) // split_count(self.split_axes(row), self.axis_sizes)

    def gathered_elements(self, row: ParamRow) -> int:
        """Numbers of a row that one device computes with: those it keeps, times what it collects."""
        return self.local_elements(row) * split_count(self.gather_axes(row), self.axis_sizes)


def workload_of(plan: Plan) -> Workload:
    """The train step that a plan runs."""
    recipe, table = plan.recipe, stored_rows(plan.table)
    return Workload(
        facts=plan.facts,
        table=table,
        specs=plan.specs,
        optimizer=tuple(
            StateTensor(row, part.specs[row.name])
            for part in plan.parts.values()
            if part.name != PARAMS
            for row in part.rows
        ),
        rules=plan.rules,
        axis_sizes=plan.mesh.axis_sizes,
        rows=plan.micro_rows,
        tokens=recipe.data.seq_len,
        micro_batches=recipe.optim.accumulation,
        compute=recipe.precision.compute,
        remat=recipe.remat.policy,
        offloaded=plan.offloaded,
        attention="splash" if plan.splash else "plain",
        query_gradient_parts=_query_gradient_parts(plan),
        experts=plan.experts,
        loss_chunk_tokens=plan.loss_chunk_tokens,
    )


def _query_gradient_parts(plan: Plan) -> int:
    """One for each tile of keys where splash attention's backward kernel is the fused one."""
    fused = plan.splash is not None and plan.splash.fused_backward
    return plan.recipe.data.seq_len // plan.splash.key if plan.splash is not None and fused else 0
