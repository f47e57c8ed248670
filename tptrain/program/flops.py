"""Floating point operations of a module's instructions; a multiply-add is two.

Matrix products are `dot` or, once libtpu has been over them, `convolution`. A Pallas kernel is a custom call
that XLA cannot look into: its FLOPs are those of its own cost estimate, or those of attention by its shapes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tptrain.program.hlo_text import Computation, Instruction

PALLAS_TARGET = "tpu_custom_call"


def matmul_flops(computation: Computation, instruction: Instruction) -> int:
    """FLOPs of a `dot` or `convolution` of `computation`; 0 for anything else."""
    if instruction.opcode == "dot":
        return _dot_flops(computation, instruction)
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    return 0


def _dot_flops(computation: Computation, instruction: Instruction) -> int:
    lhs = computation.operand(instruction, 0).array
    contracted = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
    return 2 * instruction.array.num_elements * math.prod(lhs.dims[int(dim)] for dim in contracted)


def _convolution_flops(computation: Computation, instruction: Instruction) -> int:
    """Multiply-adds with padding and dilation left out, as XLA's HloCostAnalysis counts them.

    libtpu writes the batch dims of a matrix product as spatial dims whose padding leaves one valid product.
    """
    lhs, rhs = (computation.operand(instruction, position).array for position in (0, 1))
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels") or "")
    assert labels, f"{instruction.name} has no dim_labels"
    spatial = sorted(label for label in labels[1] if label.isdigit())
    windows = _windows(instruction.attribute("window"), len(spatial))
    valid = 1
    for label, window in zip(spatial, windows, strict=True):
        sizes = (lhs.dims[labels[1].index(label)], instruction.array.dims[labels[3].index(label)])
        valid *= _valid_products(*sizes, window)
    batch = lhs.dims[labels[1].index("b")] // int(instruction.attribute("batch_group_count") or 1)
    inputs, outputs = (rhs.dims[labels[2].index(label)] for label in "io")
    return 2 * batch * inputs * outputs * valid


@dataclass(frozen=True)
class _Window:
    """How a convolution's kernel moves along one dim, in the words of XLA's `window` attribute."""

    size: int = 1
    stride: int = 1
    pad_low: int = 0
    lhs_dilate: int = 1
    rhs_dilate: int = 1


def _windows(text: str | None, count: int) -> list[_Window]:
    """`{size=1x8 stride=1x7 pad=0_0x7_7 lhs_dilate=1x8}` -> one window for each of `count` dims."""
    fields = dict(re.findall(r"(\w+)=(\S+)", (text or "").strip("{}")))

    def numbers(name: str, default: int) -> list[int]:
        values = fields[name].split("x") if name in fields else [str(default)] * count
        return [int(value.split("_")[0]) for value in values]

    columns = (
        numbers("size", 1),
        numbers("stride", 1),
        numbers("pad", 0),
        numbers("lhs_dilate", 1),
        numbers("rhs_dilate", 1),
    )
    return [_Window(*row) for row in zip(*columns, strict=True)]


@lru_cache
def _valid_products(input_size: int, output_size: int, window: _Window) -> int:
    """Pairs of an output place and a kernel place that meet a real element of the input."""
    dilated = (input_size - 1) * window.lhs_dilate + 1
    count = 0
    for kernel in range(window.size):
        first = kernel * window.rhs_dilate - window.pad_low
        places = (first + output * window.stride for output in range(output_size))
        count += sum(0 <= place < dilated and place % window.lhs_dilate == 0 for place in places)
    return count


def custom_call_flops(
    computation: Computation, instruction: Instruction, attention_density: float
) -> float | None:
    """FLOPs of a Pallas kernel; None for a kernel that gives no cost and is no attention.

    attention_density: the part of all (query, key) pairs that the mask leaves, for attention without a cost
    estimate of its own.
    """
    stated = re.search(r'"cost_estimate":(\{[^}]*\})', instruction.attributes)
    flops = int(json.loads(stated[1]).get("flops", 0)) if stated else 0
    if flops > 0:
        return float(flops)
    operands = _attention_operands(computation, instruction)
    products = attention_products(instruction, operands)
    if products is None:
        return None
    return attention_flops(operands[0], operands[1], products, attention_density)


def attention_products(instruction: Instruction, operands: Sequence[tuple[int, ...]]) -> int | None:
    """Matrix products of one attention kernel, each over all (query, key) pairs; None for other kernels.

    The kernels of JAX's splash attention are told by their names: forward 2 (scores, values); dq 3 (scores,
    dP, dQ); dkv 4 (scores, dP, dV, dK), and 5 where it makes dQ too, which then comes in one part for each
    block of keys, with one dim more than the query.
    """
    found = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", f"{instruction.name} {instruction.op_name}")
    if found is None or len(operands) < 2:
        return None
    parts_of_dq = any(len(array.dims) > len(operands[0]) for array in instruction.arrays)
    return {"fwd": 2, "dq": 3, "dkv": 5 if parts_of_dq else 4}[found[1]]


def attention_flops(query: Sequence[int], key: Sequence[int], products: int, density: float) -> float:
    """FLOPs of `products` matrix products over the (query, key) pairs that a mask leaves.

    query: [..., T, H]. key: [..., S, H]; every query row meets S keys, also where heads share them.
    density: part of the T x S pairs that the mask leaves; 0.5 for a causal one.
    """
    return 2.0 * products * math.prod(query) * key[-2] * density


def _attention_operands(computation: Computation, instruction: Instruction) -> list[tuple[int, ...]]:
    """Dims of the first two floating point operands of three dims or more."""
    arrays = [array for name in instruction.operands for array in computation.by_name[name].arrays]
    large = [array.dims for array in arrays if "f" in array.dtype and len(array.dims) >= 3]
    return large[:2]
