"""Estimates of mixtures of experts: all experts for memory, those that a token is given to for time."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.samples import SMALL_LLAMA, small_recipe
from tptrain.config import MeshSection, ModelSection, RematSection
from tptrain.config.planning import plan_recipe
from tptrain.estimate.activations import device_bytes, layer_activations
from tptrain.estimate.roofline import step_flops
from tptrain.estimate.workload import Workload, workload_of

# D 96, N 8, K 4, H 12, F 176, V 1031, 48 rows x 256 tokens, and experts: 10 of width 40, 3 for a token.
TOKENS, D, EXPERTS, CHOSEN, WIDTH = 48 * 256, 96, 10, 3, 40
ATTENTION = 2 * 96 * D + 2 * 48 * D
PAIRS = 48 * 4 * 96 * (256 * 257 // 2)


def work_of(dense: list[int], remat: str = "full") -> Workload:
    """Three layers on cpu-8 as fsdp=4 x tensor=2. dense: those with an MLP."""
    config: dict[str, Any] = {
        **SMALL_LLAMA,
        **{"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 12},
        **{"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": WIDTH},
        "mlp_only_layers": dense,
    }
    recipe = small_recipe(
        model=ModelSection(config=config, tokenizer="train"),
        mesh=MeshSection(fsdp=4, tensor=2),
        remat=RematSection(policy=remat),  # type: ignore[arg-type]
    )
    return workload_of(plan_recipe(recipe, {}))


@pytest.mark.parametrize("dense", [[], [1]])
def test_flops_count_the_chosen_experts_and_the_router(dense: list[int]) -> None:
    mixture = EXPERTS * D + CHOSEN * 3 * WIDTH * D
    mlps = sum(3 * 176 * D if layer in dense else mixture for layer in range(3))
    matrices = 3 * ATTENTION + mlps + 1031 * D
    assert step_flops(work_of(dense)).model == 6 * matrices * TOKENS + 3 * 3 * PAIRS


def test_memory_counts_all_experts() -> None:
    """A quarter of D by fsdp, and half of every expert's width by tensor; the router keeps all its rows."""
    work = work_of([])
    local = {row.name.removeprefix("model.layers.1."): work.local_elements(row) for row in work.table}
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert local[f"mlp.experts.{name}.weight"] == EXPERTS * (WIDTH // 2) * (D // 4)
    assert local["mlp.gate.weight"] == EXPERTS * D // 4
    gathered = next(row for row in work.table if row.name.endswith("1.mlp.experts.up_proj.weight"))
    assert work.gathered_elements(gathered) == EXPERTS * (WIDTH // 2) * D


@pytest.mark.parametrize(("dense", "width"), [([], CHOSEN * WIDTH), ([1], 176)])
def test_activations_are_those_of_the_chosen_experts(dense: list[int], width: int) -> None:
    """Or those of an MLP where some layer has one that is wider."""
    work = work_of(dense)
    sizes = {each.name: device_bytes(each, work) for each in layer_activations(work)}
    assert sizes["gate"] == sizes["up"] == sizes["mlp_hidden"] == 12 * 256 * (width // 2) * 2


def test_products_of_experts_that_are_computed_again() -> None:
    """Full remat: all of a layer but the last matrix, whose output no gradient needs."""
    again = ATTENTION + EXPERTS * D + CHOSEN * 2 * WIDTH * D
    found = step_flops(work_of([])).recomputed
    assert found == 3 * 2 * again * TOKENS + 3 * PAIRS
