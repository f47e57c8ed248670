"""Mesh axes and sharding rules, stated once in names and free of any framework."""

from tptrain.mesh.axes import AXES, MeshShape, fill_axes
from tptrain.mesh.rules import STYLES, RuleTable, Spec, param_specs, shard_slices, spec_of, table_problems

__all__ = [
    "AXES",
    "STYLES",
    "MeshShape",
    "RuleTable",
    "Spec",
    "fill_axes",
    "param_specs",
    "shard_slices",
    "spec_of",
    "table_problems",
]
