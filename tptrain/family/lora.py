"""Adapters of low rank (LoRA, arXiv:2106.09685) as rows of the parameter table.

A projection with the row `W` [out, in] becomes x W^T + scale * (x A^T) B^T; its adapter is the rows
`lora_A` [rank, in] and `lora_B` [out, rank], named as in PEFT. They are split like the dims of `W` that they
share with it, so an adapter lies where its projection does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from tptrain.family.layer_runs import layer_of
from tptrain.family.table import PARAM_DIMS, ParamRow, matrix

ADAPTED_DIMS = frozenset({"embed", "heads", "kv_heads", "mlp"})

# What PEFT puts before the names of the model that it wraps.
_PEFT_PREFIX = "base_model.model."
_WEIGHT, _A, _B = ".weight", ".lora_A", ".lora_B"


def module_of(row: ParamRow) -> str:
    """The module that a row belongs to, `model.layers.7.self_attn.q_proj`; of an adapter the adapted one."""
    return row.name.removesuffix(_WEIGHT).removesuffix(_A).removesuffix(_B)


def model_rows(table: Iterable[ParamRow]) -> tuple[ParamRow, ...]:
    """The table without adapters."""
    return tuple(row for row in table if not row.is_adapter)


def adaptable_rows(table: Iterable[ParamRow]) -> list[ParamRow]:
    """The projections of the layers that every token goes through; those of experts are none of them."""
    return [
        row
        for row in table
        if len(row.dims) == 2 and ADAPTED_DIMS.issuperset(row.dims) and layer_of(row.name) is not None
    ]


def is_target(row: ParamRow, target: str) -> bool:
    """Whether a target means this projection: by one of its dims, its module's name, or a pattern of it."""
    if target in PARAM_DIMS:
        return target in row.dims
    module = module_of(row)
    return fnmatchcase(module, target) or fnmatchcase(module.rpartition(".")[2], target)


def with_adapters(table: Iterable[ParamRow], rank: int, targets: Sequence[str]) -> tuple[ParamRow, ...]:
    """The table with the two rows of an adapter behind every projection that a target means."""
    table = tuple(table)
    adapted = {row.name for row in adaptable_rows(table) if any(is_target(row, target) for target in targets)}
    return tuple(
        each for row in table for each in ((row, *adapter_rows(row, rank)) if row.name in adapted else (row,))
    )


def adapter_rows(row: ParamRow, rank: int) -> tuple[ParamRow, ParamRow]:
    """A and B of one projection; B begins as zeros, so that an adapter begins as nothing."""
    module, (out_dim, in_dim), (out_size, in_size) = module_of(row), row.dims, row.size
    a = matrix(f"{module}{_A}{_WEIGHT}", ("rank", in_dim), (rank, in_size))
    b = matrix(f"{module}{_B}{_WEIGHT}", (out_dim, "rank"), (out_size, rank))
    return (
        replace(a, init="kaiming_uniform", in_files=(f"{_PEFT_PREFIX}{a.name}",)),
        replace(b, init="zeros", in_files=(f"{_PEFT_PREFIX}{b.name}",)),
    )


def adapted_modules(table: Iterable[ParamRow]) -> list[str]:
    """The modules with an adapter, in the order of the table."""
    return list(dict.fromkeys(module_of(row) for row in table if row.is_adapter))


def peft_config(table: Sequence[ParamRow], rank: int, alpha: float, base: str | None) -> dict[str, Any]:
    """What PEFT's adapter_config.json says of the adapters in a table.

    base: folder or hub id of the adapted model; None where it has none that PEFT could load.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": _target_modules(table),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _target_modules(table: Sequence[ParamRow]) -> list[str]:
    """The last parts of the modules' names where these mean exactly the adapted ones, else whole names."""
    adapted = adapted_modules(table)
    leaves = {module.rpartition(".")[2] for module in adapted}
    files = (name for row in table if not row.is_adapter for name in row.file_sizes)
    modules = (name.removesuffix(_WEIGHT) for name in files)
    meant = [module for module in modules if module.rpartition(".")[2] in leaves]
    return sorted(leaves) if set(meant) == set(adapted) else adapted
