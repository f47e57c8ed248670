"""Bad inputs and the one clear error that each must give: a table that grows with the package.

Each entry gives the overrides (or the script) that trigger it, all five parts of the problem, and, where the
problem names a value that passes, overrides that follow the advice and must plan without problems.
"""

from __future__ import annotations

from bad_input_form import BadInput
from bad_models import LORA, MESHES, MODELS, SCRIPTS, TOKENS, TRAINABLE
from bad_settings import OVERRIDES, RECIPES

BAD_INPUTS: list[BadInput] = [*OVERRIDES, *RECIPES, *MESHES, *MODELS, *TRAINABLE, *TOKENS, *LORA, *SCRIPTS]
