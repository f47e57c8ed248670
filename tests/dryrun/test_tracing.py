"""What a child that traces says when it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tptrain.config.overrides import apply_overrides
from tptrain.config.planning import plan_recipe
from tptrain.config.recipe_file import load_recipe
from tptrain.dryrun.tracing import TraceError, trace_in_child

LLAMA = Path(__file__).parents[2] / "recipes" / "llama3_8b_gsm8k.py"


def test_a_refusal_arrives_as_its_message_and_not_as_a_traceback(tmp_path: Path) -> None:
    """The model's folder is there for the plan, and gone when the child reads it again."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(load_recipe(LLAMA).model.config))
    overrides = [
        "topology=v5e-4",
        "data.path=x.jsonl",
        "model.config=pretrained",
        f"model.pretrained={folder}",
    ]
    plan = plan_recipe(apply_overrides(load_recipe(LLAMA), overrides))
    shutil.rmtree(folder)
    with pytest.raises(TraceError) as raised:
        trace_in_child(plan)
    message = str(raised.value)
    assert message.startswith("the step cannot be traced: 1 problem:") and str(folder) in message
    assert "Traceback" not in message
