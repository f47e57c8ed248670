"""FLOPs of matrix products and of attention kernels, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from tptrain.program.flops import attention_flops, custom_call_flops, matmul_flops
from tptrain.program.hlo_text import Computation, Instruction, parse_module


def only(lines: str, name: str) -> tuple[Computation, Instruction]:
    entry = parse_module(f"HloModule m\n\nENTRY %main () -> f32[] {{\n{lines}\n}}\n").entry
    return entry, entry.by_name[name]


@pytest.mark.parametrize(
    ("lhs", "rhs", "result", "attributes", "flops"),
    [
        # [12, 512] x [512, 640]
        ("12,512", "512,640", "12,640", "dim_labels=bf_io->bf", 2 * 12 * 512 * 640),
        # The right side stored transposed.
        ("12,512", "640,512", "12,640", "dim_labels=bf_oi->bf", 2 * 12 * 512 * 640),
        # A batch of 6 products [5, 7] x [7, 3]: of 6 kernel places each output meets one.
        (
            *("6,5,7", "6,3,7", "6,5,3"),
            "window={size=6 stride=5 pad=0_0 lhs_dilate=6}, dim_labels=0bf_0oi->0bf",
            2 * 6 * 5 * 7 * 3,
        ),
        # A real convolution over 10 places with a kernel of 3 and one place of padding on both sides.
        ("4,10,7", "3,7,9", "4,10,9", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 4 * 28 * 7 * 9),
        # Two groups: each output feature sees half of the input features.
        ("12,8", "4,6", "12,6", "dim_labels=bf_io->bf, feature_group_count=2", 2 * 12 * 4 * 6),
    ],
)
def test_convolutions(lhs: str, rhs: str, result: str, attributes: str, flops: int) -> None:
    lines = (
        f"  %a = bf16[{lhs}] parameter(0)\n  %b = bf16[{rhs}] parameter(1)\n"
        f"  ROOT %c = bf16[{result}] convolution(%a, %b), {attributes}"
    )
    assert matmul_flops(*only(lines, "c")) == flops


def test_a_batched_dot() -> None:
    lines = (
        "  %a = f32[3,11,5,7] parameter(0)\n  %b = f32[3,5,7,13] parameter(1)\n"
        "  ROOT %c = f32[3,11,13] dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2,3},"
        " rhs_batch_dims={0}, rhs_contracting_dims={1,2}"
    )
    assert matmul_flops(*only(lines, "c")) == 2 * 3 * 11 * 13 * 35


# Splash attention with 2 kv heads of 4 query heads each, 1024 tokens, batch 2, as libtpu prints its calls.
OPERANDS = """  %block_mask = s8[1,2,2]{2,1,0} constant({...})
  %q = bf16[2,2,4,1024,128]{4,3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[2,2,512,128]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %v = bf16[2,2,512,128]{3,2,1,0:T(8,128)(2,1)} parameter(2)
"""
PRODUCT = 2 * (2 * 2 * 4 * 1024 * 128) * 512


def kernel(name: str, results: str, config: str = '"body":"TUzvUgFN","needs_layout_passes":true') -> str:
    return (
        f"{OPERANDS}  ROOT %kernel = ({results}) custom-call(%block_mask, %q, %k, %v), custom_call_target="
        f'"tpu_custom_call", metadata={{op_name="jit(g)/{name}_block_q=512_k_layout=1/pallas_call"}},'
        f' backend_config={{"custom_call_config":{{{config}}}}}'
    )


@pytest.mark.parametrize(
    ("name", "results", "products"),
    [
        ("splash_mqa_fwd_residuals", "f32[2,2,512,128]{3,2,1,0}, bf16[2,2,4,1024,128]{4,3,2,1,0}", 2),
        ("splash_mha_dq", "f32[2,2,512,128]{3,2,1,0}, bf16[2,2,4,1024,128]{4,3,2,1,0}", 3),
        ("splash_mqa_dkv", "bf16[2,2,512,128]{3,2,1,0}, bf16[2,2,512,128]{3,2,1,0}", 4),
        ("splash_mqa_dkv", "bf16[2,2,2,4,1024,128]{5,4,3,2,1,0}, bf16[2,2,512,128]{3,2,1,0}", 5),
    ],
)
@pytest.mark.parametrize("density", [0.5, 0.125])
def test_attention_kernels(name: str, results: str, products: int, density: float) -> None:
    found = custom_call_flops(*only(kernel(name, results), "kernel"), density)
    assert found == products * PRODUCT * density


def test_a_stated_cost_goes_before_shapes() -> None:
    config = '"body":"TUzvUgFN","cost_estimate":{"flops":"123456","bytes_accessed":"99"}'
    text = kernel("splash_mha_dq", "bf16[2,2,4,1024,128]{4,3,2,1,0}", config)
    assert custom_call_flops(*only(text, "kernel"), 0.5) == 123_456


def test_an_unknown_kernel_has_no_flops() -> None:
    assert custom_call_flops(*only(kernel("my_kernel", "f32[8]{0}"), "kernel"), 0.5) is None


def test_attention_of_a_causal_layer() -> None:
    """4 B N T^2 H / 2 for the forward pass, as textbooks have it."""
    flops = attention_flops((1, 32, 2048, 128), (1, 8, 2048, 128), products=2, density=0.5)
    assert flops == 4 * 32 * 2048**2 * 128 / 2
