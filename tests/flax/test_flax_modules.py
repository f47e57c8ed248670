"""The Flax decoder as NNX modules: its tree of parameters, several devices, and no torch beneath it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests import small
from tests.flax.oracle import ROWS, facts_of, flax_logits, params_of, relative, torch_logits
from tptrain.errors import Problem, ProblemsError
from tptrain.family import parameter_table, stored_rows
from tptrain.jaxside.flax_decoder import FlaxDecoder
from tptrain.jaxside.specs import jax_mesh, named_sharding


@pytest.mark.parametrize("config", ["biases", "tied"])
def test_params_give_back_the_tree_that_was_given(config: str) -> None:
    params = params_of(config)
    decoder = FlaxDecoder(facts_of(config), params)
    merged = nnx.merge(*nnx.split(decoder))
    for found in (decoder.params(), merged.params()):
        assert list(found) == [row.name for row in stored_rows(parameter_table(facts_of(config)))]
        assert all(found[name] is array for name, array in params.items())
    assert len(jax.tree.leaves(nnx.state(decoder))) == len(params), "parameters are the only state"
    assert decoder.model.layers[2].mlp.up_proj.weight[...].shape == (176, 120)
    rows = ROWS["packed"]
    logits = nnx.jit(FlaxDecoder.__call__)(merged, rows.tokens, rows.positions, rows.segment_ids)
    assert relative(logits[rows.real], torch_logits(config, "packed")) <= 1e-5


def test_params_of_another_model_are_refused_with_every_name() -> None:
    params: dict[str, Any] = params_of("default")
    del params["model.norm.weight"]
    params["model.layers.1.mlp.up_proj.weight"] = params["model.layers.1.mlp.up_proj.weight"].T
    params["lm_head.weight"] = jnp.zeros((small.VOCAB + 1, 120))
    params["model.norm.wieght"] = jnp.ones(120)
    params["model"] = {"norm": {}}
    with pytest.raises(ProblemsError) as error:
        FlaxDecoder(facts_of("default"), params)
    missing, extra = "is a parameter of this model", "is no parameter of this model"
    misshapen, layout = "must have the shape that the model's config gives", "matrices are [out, in]"
    checkpoint, spare = "the params of a checkpoint of this model", "params without it"
    assert list(error.value.problems) == [
        Problem("params/model.norm.weight", "nothing", missing, "shape [120]", checkpoint),
        Problem(
            "params/model.layers.1.mlp.up_proj.weight", [120, 176], misshapen, layout, "shape [176, 120]"
        ),
        Problem("params/lm_head.weight", [1032, 120], misshapen, layout, "shape [1031, 120]"),
        Problem("params/model", "dict", extra, "nearest that is missing: none", spare),
        Problem(
            "params/model.norm.wieght", [120], extra, "nearest that is missing: model.norm.weight", spare
        ),
    ]


def test_a_head_beside_tied_embeddings_is_refused() -> None:
    params = params_of("tied")
    params["lm_head.weight"] = params["model.embed_tokens.weight"]
    with pytest.raises(ProblemsError, match=r"lm_head.weight.*its data is that of model.embed_tokens.weight"):
        FlaxDecoder(facts_of("tied"), params)


@pytest.mark.parametrize(("format", "tolerance"), [("float64", 1e-13), ("float32", 4e-6)])
@pytest.mark.parametrize(("fsdp", "tensor"), [(2, 1), (1, 2)])
def test_sharded_parameters_give_the_same_logits(
    fsdp: int, tensor: int, format: str, tolerance: float
) -> None:
    """Over two devices, split as a run splits them but for the vocabulary, which is odd. Only the order of
    sums differs, which is rounding: float64 tells it from a fault.
    """
    plan = small.small_plan(fsdp, tensor, topology="cpu-2")
    mesh, rows = jax_mesh(plan.mesh), ROWS["packed"]
    shardings = {}
    for row in stored_rows(plan.table):
        spec = zip(row.dims, plan.specs[row.name], strict=True)
        shardings[row.name] = named_sharding(
            mesh, tuple(() if dim == "vocab" else axes for dim, axes in spec)
        )
    with jax.experimental.enable_x64(format == "float64"):
        params = params_of("llama3", format)
        split = {name: jax.device_put(array, shardings[name]) for name, array in params.items()}
        assert sum(not array.sharding.is_fully_replicated for array in split.values()) >= 3 * 7
        expected = flax_logits(FlaxDecoder(plan.facts, params), rows)
        batch_sharding = named_sharding(mesh, (("fsdp",), ()))
        inputs = [jax.device_put(a, batch_sharding) for a in (rows.tokens, rows.positions, rows.segment_ids)]
        logits = nnx.jit(FlaxDecoder.__call__)(FlaxDecoder(plan.facts, split), *inputs)
    assert len(logits.sharding.device_set) == 2 and logits.dtype == format
    assert relative(logits, expected) <= tolerance


WITHOUT_TORCH = """
import json, sys
import numpy as np
from tptrain.jaxside.process import setup_jax
setup_jax(1)
import jax.numpy as jnp
from tptrain.family import facts_from_config, parameter_table, stored_rows
from tptrain.jaxside import flax_train
from tptrain.jaxside.flax_decoder import FlaxDecoder

facts = facts_from_config(json.loads(sys.argv[1]))
random = np.random.default_rng(0)
rows = stored_rows(parameter_table(facts))
params = {row.name: jnp.asarray(random.normal(size=row.size), jnp.float32) for row in rows}
tokens = random.integers(0, facts.vocab_size, (2, 7))
logits = FlaxDecoder(facts, params)(tokens, np.tile(np.arange(7), (2, 1)), np.ones_like(tokens))
assert logits.shape == (2, 7, facts.vocab_size) and jnp.isfinite(logits).all()
print(sorted({"torch", "torch_xla", "transformers"} & {name.split(".")[0] for name in sys.modules}))
"""


def test_the_decoder_runs_without_torch() -> None:
    """Built from a config and random parameters and called outside of any jit, by a process of its own."""
    command = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(small.LLAMA3)]
    root = Path(small.__file__).parents[1]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "[]"
