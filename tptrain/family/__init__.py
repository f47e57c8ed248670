"""Model families: Hugging Face config in, facts and parameter table out. No framework is imported."""

from tptrain.family.facts import LayerKind, ModelFacts, RopeFacts
from tptrain.family.registry import FAMILIES, facts_from_config, parameter_table
from tptrain.family.table import PARAM_DIMS, ParamRow, stored_rows

__all__ = [
    "FAMILIES",
    "PARAM_DIMS",
    "LayerKind",
    "ModelFacts",
    "ParamRow",
    "RopeFacts",
    "facts_from_config",
    "parameter_table",
    "stored_rows",
]
