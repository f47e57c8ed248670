"""Model families: Hugging Face config in, facts and parameter table out. No framework is imported."""

from tptrain.family.facts import LayerKind, ModelFacts, RopeFacts
from tptrain.family.layer_runs import LayerRuns, layer_of, layer_runs
from tptrain.family.registry import FAMILIES, facts_from_config, parameter_table
from tptrain.family.table import PARAM_DIMS, ParamRow, stored_rows

__all__ = [
    "FAMILIES",
    "PARAM_DIMS",
    "LayerKind",
    "LayerRuns",
    "ModelFacts",
    "ParamRow",
    "RopeFacts",
    "facts_from_config",
    "layer_of",
    "layer_runs",
    "parameter_table",
    "stored_rows",
]
