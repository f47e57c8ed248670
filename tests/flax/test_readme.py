"""The README's Flax example, run as it is printed, on a run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests import small
from tptrain.ckpt.importing import write_step
from tptrain.family import facts_from_config, parameter_table

ROOT = Path(__file__).parents[2]


def test_the_readmes_example_takes_a_step(tmp_path: Path) -> None:
    config = small.LLAMA3
    table = parameter_table(facts_from_config(config))
    source = small.DictSource(small.weights_of(small.reference_model(config)))
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets/config.json").write_text(json.dumps(config))
    write_step(tmp_path / "checkpoints/100", table, source, {"step": 100, "hf_config": config})
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = [part.split("```")[0] for part in readme.split("```python\n")[1:] if "FlaxDecoder" in part]
    assert '"/path/to/runs/tiny_gsm8k"' in code
    batch = {name: array[0] for name, array in small.train_batch(0).items()}
    names: dict[str, Any] = {"batch": batch}
    exec(code.replace("/path/to/runs/tiny_gsm8k", str(tmp_path)), names)
    assert 0 < float(names["value"]) < 20
    updated = names["updated"]
    assert set(updated) == set(source.tensors)
    moved = {name: np.abs(np.asarray(updated[name]) - t.numpy()).max() for name, t in source.tensors.items()}
    assert all(0 < change < 1e-3 for change in moved.values()), moved
