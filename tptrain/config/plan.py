"""What will run: the plan, in which every number is fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tptrain.config.kernels import SplashBlocks
from tptrain.config.schema import Recipe
from tptrain.family import ModelFacts, ParamRow
from tptrain.mesh import MeshShape, RuleTable, Spec
from tptrain.topology import Topology


@dataclass(frozen=True)
class Plan:
    """A resolved run. Made by `resolve`; nothing in it is looked up on a device or left to a default.

    recipe:      the recipe as asked for, overrides applied.
    hf_config:   the model's config.json as a dict (architecture fields at least).
    table:       the parameter table, `vocab` padded for this mesh.
    specs:       row name -> spec, in mesh axis names.
    splash:      the tiles of splash attention, None where plain attention runs.
    micro_rows:  rows per micro-batch over all devices: batch_rows / accumulation.
    output_dir:  the run's folder. export_dir: the exported model's, None when nothing is exported.
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
    micro_rows: int
    output_dir: str
    export_dir: str | None
    notices: tuple[str, ...] = ()

    @property
    def num_devices(self) -> int:
        return self.mesh.num_devices

    @property
    def batch_shards(self) -> int:
        """Into how many parts the rows of a micro-batch are split."""
        sizes = self.mesh.axis_sizes
        return sizes["data"] * sizes["fsdp"]

    @property
    def padded_vocab(self) -> int:
        return next(row.padded_size[row.dims.index("vocab")] for row in self.table if "vocab" in row.dims)
