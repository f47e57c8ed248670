"""Where the activations that a remat policy keeps wait for the backward pass."""

from __future__ import annotations

import pytest
from samples import small_recipe

from tptrain.config import Plan
from tptrain.config.overrides import apply_overrides
from tptrain.config.planning import plan_recipe
from tptrain.config.remat import LAYER_INPUT
from tptrain.report.plan_page import plan_page


def planned(*overrides: str) -> Plan:
    return plan_recipe(apply_overrides(small_recipe(), overrides), {})


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("full", set()),
        ("attention", set()),
        ("offload", {LAYER_INPUT}),
        ("offload_attention", {LAYER_INPUT, "attended", "logsumexp"}),
    ],
)
def test_a_host_holds_what_the_policy_offloads_from_its_tpus(policy: str, expected: set[str]) -> None:
    assert planned("topology=v5e-8", f"remat.policy={policy}").offloaded == expected
    assert planned("topology=cpu-8", f"remat.policy={policy}").offloaded == set()


@pytest.mark.parametrize("policy", ["offload", "offload_attention"])
def test_the_page_says_where_nothing_is_offloaded(policy: str) -> None:
    sentence = f"remat.policy={policy} offloads nothing on topology=cpu-8"
    assert sentence in plan_page(planned(f"remat.policy={policy}"))
    assert "offloads nothing" not in plan_page(planned("remat.policy=full"))
    assert "offloads nothing" not in plan_page(planned("topology=v5e-8", f"remat.policy={policy}"))
