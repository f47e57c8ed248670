"""Recipes and plans: what the user asks for, and what will run. No framework is imported.

`schema` holds the recipe, `overrides` and `recipe_file` read one, `resolve` turns it into a plan.
"""

from tptrain.config.plan import Plan
from tptrain.config.schema import (
    DataSection,
    EvalSection,
    ExportSection,
    GuardsSection,
    KernelsSection,
    LogSection,
    LoraSection,
    LossSection,
    MeshSection,
    ModelSection,
    OptimSection,
    PrecisionSection,
    Recipe,
    RematSection,
    SaveSection,
    ScheduleSection,
    SourceSection,
)

__all__ = [
    "DataSection",
    "EvalSection",
    "ExportSection",
    "GuardsSection",
    "KernelsSection",
    "LogSection",
    "LoraSection",
    "LossSection",
    "MeshSection",
    "ModelSection",
    "OptimSection",
    "Plan",
    "PrecisionSection",
    "Recipe",
    "RematSection",
    "SaveSection",
    "ScheduleSection",
    "SourceSection",
]
