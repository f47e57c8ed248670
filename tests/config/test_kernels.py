"""Which attention a plan runs, and its tiles."""

from __future__ import annotations

import json

import pytest
from samples import MIXTRAL, small_recipe

from tptrain.config import KernelsSection, Plan
from tptrain.config.kernels import SplashBlocks
from tptrain.config.overrides import apply_overrides
from tptrain.config.planning import plan_recipe
from tptrain.report.plan_page import plan_json, plan_page


def planned(*overrides: str) -> Plan:
    return plan_recipe(apply_overrides(small_recipe(), overrides), {})


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("topology=cpu-8",), None),
        (("topology=cpu-1", "backend=torch"), None),
        (("topology=v5e-8",), SplashBlocks(256, 256, 256)),
        (("topology=v5p-16", "kernels.attention=splash"), SplashBlocks(256, 256, 256)),
        (("topology=v5e-8", "kernels.attention=plain"), None),
    ],
)
def test_auto_is_splash_on_tpus_alone(overrides: tuple[str, ...], expected: SplashBlocks | None) -> None:
    plan = planned(*overrides)
    assert plan.splash == expected
    assert not any("attention" in notice for notice in plan.notices)


@pytest.mark.parametrize(
    ("seq_len", "asked", "expected"),
    [
        # seq_len -> the largest multiple of 128 up to 512 that divides it
        (128, (), SplashBlocks(128, 128, 128)),
        (384, (), SplashBlocks(384, 384, 384)),
        (512, (), SplashBlocks(512, 512, 512)),
        (640, (), SplashBlocks(128, 128, 128)),
        (2048, (), SplashBlocks(512, 512, 512)),
        (2048, ("splash_block_q=1024", "splash_block_kv=2048"), SplashBlocks(1024, 2048, 512)),
        (2048, ("splash_block_kv=1024", "splash_block_kv_compute=128"), SplashBlocks(512, 1024, 128)),
        (2048, ("splash_fused_backward=true",), SplashBlocks(512, 512, 512, fused_backward=True)),
    ],
)
def test_tiles(seq_len: int, asked: tuple[str, ...], expected: SplashBlocks) -> None:
    given = ("model.config.max_position_embeddings=4096", f"data.seq_len={seq_len}", "topology=v5e-8")
    assert planned(*given, *(f"kernels.{override}" for override in asked)).splash == expected


def test_rows_that_the_kernel_does_not_take_are_a_notice_under_auto() -> None:
    plan = planned("topology=v5e-8", "data.seq_len=200")
    assert plan.splash is None
    (notice,) = [n for n in plan.notices if "attention" in n]
    for part in ("Plain attention runs", "data.seq_len=200", "multiple of 128", "128 or 256"):
        assert part in notice


def test_tiles_without_a_kernel_are_a_notice() -> None:
    overrides = ("kernels.splash_block_q=256", "kernels.splash_fused_backward=true")
    for place in ("topology=cpu-8", "kernels.attention=plain"):
        notices = planned(place, *overrides).notices
        assert [n for n in notices if "kernels." in n] == [
            "kernels.splash_block_q=256 has no effect with plain attention.",
            "kernels.splash_fused_backward=true has no effect with plain attention.",
        ]


def test_the_page_and_the_json_say_which_attention_runs() -> None:
    splash, plain = planned("topology=v5e-8", "kernels.splash_block_kv_compute=128"), planned()
    assert "Attention: splash kernel, 256 queries x 256 keys a tile, 128 keys at a time," in plan_page(splash)
    assert "Attention: plain, every score in memory." in plan_page(plain)
    data = json.loads(json.dumps(plan_json(splash)))
    assert data["attention"] == "splash"
    assert data["splash_blocks"] == {
        "query": 256, "key": 256, "key_compute": 128, "fused_backward": False,
    }  # fmt: skip
    assert plan_json(plain)["attention"] == "plain" and plan_json(plain)["splash_blocks"] is None


def test_a_recipe_may_hold_a_kernels_section() -> None:
    recipe = small_recipe(topology="v5e-8", kernels=KernelsSection(attention="plain"))
    assert plan_recipe(recipe, {}).splash is None


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((*MIXTRAL, "topology=cpu-8"), "plain"),
        ((*MIXTRAL, "topology=cpu-1", "backend=torch"), "plain"),
        ((*MIXTRAL, "topology=v5e-8"), "grouped"),
        ((*MIXTRAL, "topology=v5p-16", "kernels.experts=grouped"), "grouped"),
        ((*MIXTRAL, "topology=v5e-8", "kernels.experts=plain"), "plain"),
        (("topology=v5e-8",), None),
    ],
)
def test_experts_are_grouped_on_tpus_alone(overrides: tuple[str, ...], expected: str | None) -> None:
    plan = planned(*overrides)
    assert plan.experts == expected and plan_json(plan)["experts"] == expected
    assert not any("kernels.experts" in notice for notice in plan.notices)
    assert ("Experts: " in plan_page(plan)) == (expected is not None)


def test_a_core_of_experts_that_are_not_there_is_a_notice() -> None:
    notices = planned("topology=v5e-8", "kernels.experts=plain").notices
    assert "kernels.experts=plain has no effect: the model has no experts." in notices
