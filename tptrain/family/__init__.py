"""Model families: Hugging Face config in, facts and parameter table out. No framework is imported."""

from tptrain.family.facts import AttentionKind, LayerKind, ModelFacts, RopeFacts
from tptrain.family.layer_runs import LayerRun, LayerRuns, layer_of, layer_runs
from tptrain.family.lora import adapted_modules, with_adapters
from tptrain.family.registry import ReadConfig, facts_from_config, families, parameter_table, read_config
from tptrain.family.table import PARAM_DIMS, ParamRow, stored_rows

__all__ = [
    "PARAM_DIMS",
    "AttentionKind",
    "LayerKind",
    "LayerRun",
    "LayerRuns",
    "ModelFacts",
    "ParamRow",
    "ReadConfig",
    "RopeFacts",
    "adapted_modules",
    "facts_from_config",
    "families",
    "layer_of",
    "layer_runs",
    "parameter_table",
    "read_config",
    "stored_rows",
    "with_adapters",
]
