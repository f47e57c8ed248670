"""What will run: the plan, in which every number is fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tptrain.config.compiler_flags import chosen_flags
from tptrain.config.kernels import ExpertsCore, SplashBlocks
from tptrain.config.loss_chunks import chunk_tokens
from tptrain.config.metrics import best_metric, measured_metrics
from tptrain.config.remat import offloaded
from tptrain.config.schema import Recipe
from tptrain.config.state_parts import StatePart, state_parts
from tptrain.family import LayerRuns, ModelFacts, ParamRow, layer_runs, stored_rows
from tptrain.mesh import MeshShape, RuleTable, Spec
from tptrain.mesh.rules import split_count
from tptrain.topology import Topology


@dataclass(frozen=True)
class Plan:
    """A resolved run. Made by `resolve`; nothing in it is looked up on a device or left to a default.

    recipe:      the recipe as asked for, overrides applied.
    hf_config:   the model's config.json as a dict (architecture fields at least).
    table:       the parameter table, `vocab` padded for this mesh.
    specs:       row name -> spec, in mesh axis names.
    splash:      the tiles of splash attention, None where plain attention runs.
    experts:     how the products of experts are computed, None for a model without experts.
    micro_rows:  rows per micro-batch over all devices: batch_rows / accumulation.
    output_dir:  the run's folder. export_dir: the exported model's, None when nothing is exported.
    new_rows:    of the vocabulary, beyond the checkpoint's: they begin as the mean of its rows.
    notices:     sentences about settings that work out in a way the user may want to know.
    """

    recipe: Recipe
    topology: Topology
    mesh: MeshShape
    rules: RuleTable
    facts: ModelFacts
    hf_config: Mapping[str, Any]
    table: tuple[ParamRow, ...]
    specs: Mapping[str, Spec]
    splash: SplashBlocks | None
    experts: ExpertsCore | None
    micro_rows: int
    output_dir: str
    export_dir: str | None
    new_rows: int = 0
    notices: tuple[str, ...] = ()

    @property
    def num_devices(self) -> int:
        return self.mesh.num_devices

    @property
    def batch_shards(self) -> int:
        """Into how many parts the rows of a micro-batch are split."""
        return split_count(self.rules.acts["act_batch"] or (), self.mesh.axis_sizes)

    @cached_property
    def parts(self) -> Mapping[str, StatePart]:
        """The parts of the training state by name: the weights, and what the optimizer keeps beside them."""
        return state_parts(self.table, self.specs, self.recipe.optim)

    @cached_property
    def layer_runs(self) -> LayerRuns:
        """The layers in runs that one loop computes: a stack of the XLA backend is in one."""
        return layer_runs(stored_rows(self.table), self.facts.layer_kinds)

    @property
    def exported(self) -> tuple[ParamRow, ...]:
        """The rows that the export holds: the model's, or those of its adapters."""
        return tuple(row for row in self.table if row.is_adapter == self.exports_adapter)

    @property
    def exports_adapter(self) -> bool:
        """Whether the export is an adapter, and not a model."""
        return self.recipe.lora.rank > 0 and self.recipe.export.lora == "adapter"

    @property
    def device_rows(self) -> int:
        """Rows of a micro-batch on each device."""
        return self.micro_rows // self.batch_shards

    @property
    def metrics(self) -> tuple[str, ...]:
        """The scores that an evaluation of the run gives."""
        return measured_metrics(self.recipe)

    @property
    def best_metric(self) -> str | None:
        """What makes a checkpoint the best one; None where nothing is measured."""
        return best_metric(self.recipe)

    @property
    def offloaded(self) -> frozenset[str]:
        """The activations that wait in the host's memory for the backward pass."""
        return offloaded(self.recipe.remat.policy, self.topology)

    @property
    def padded_vocab(self) -> int:
        return next(row.padded_size[row.dims.index("vocab")] for row in self.table if "vocab" in row.dims)

    @property
    def logits_token_bytes(self) -> int:
        """Bytes that a device needs for the float32 logits of one token of each of its rows."""
        pieces = split_count(self.rules.acts["act_vocab"] or (), self.mesh.axis_sizes)
        return 4 * self.device_rows * self.padded_vocab // pieces

    @property
    def tpu_flags(self) -> dict[str, str]:
        """Flags of the TPU compiler, name -> value; they mean nothing where the chips are no TPUs."""
        return chosen_flags(self.recipe.compiler.tpu_flags, self.topology.chip)

    @property
    def loss_chunk_tokens(self) -> int:
        """Tokens of every row whose logits are held at a time; they divide the row."""
        asked = self.recipe.loss.chunk_tokens
        return asked or chunk_tokens(self.recipe.data.seq_len, self.logits_token_bytes)
