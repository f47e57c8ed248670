"""Weights and the files around them: safetensors in, Hugging Face folders out."""

from tptrain.hf_files import (
    CONFIG_FILES,
    TOKENIZER_FILES,
    WEIGHT_FILES,
    local_folder,
    require_tokenizer,
)
from tptrain.weights.adapter_folder import export_adapter_folder
from tptrain.weights.assets import collect_assets
from tptrain.weights.hf_folder import check_export_target, export_bytes, export_folder
from tptrain.weights.hf_json import complete_config
from tptrain.weights.row_stream import ReadBlocks, blocks_of
from tptrain.weights.safetensors_in import SafetensorsSource

__all__ = [
    "CONFIG_FILES",
    "TOKENIZER_FILES",
    "WEIGHT_FILES",
    "ReadBlocks",
    "SafetensorsSource",
    "blocks_of",
    "check_export_target",
    "collect_assets",
    "complete_config",
    "export_adapter_folder",
    "export_bytes",
    "export_folder",
    "local_folder",
    "require_tokenizer",
]
