"""Sharding rules: which mesh axes split which dim, in the sense of JAX's logical axis rules.

A rule table maps every dim name to the mesh axes that split it, or to None for "kept whole on every device".
From a tensor's dims and a rule table follows its spec, and from the spec and the mesh the slice that each
device holds. torch_xla's shardings and JAX's NamedShardings are two renderings of the same spec.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tptrain.errors import Problem
from tptrain.family.table import ParamRow
from tptrain.mesh.axes import AXES

# One entry per dim: the mesh axes that split it, outermost first; () means replicated over the mesh.
Spec = tuple[tuple[str, ...], ...]
Rule = tuple[str, ...] | None

_BATCH_RULES: dict[str, Rule] = {
    "act_batch": ("data", "fsdp", "expert"),
    "act_tokens": None,
    "act_keys": None,
    "act_group": None,
    "act_embed": None,
    "act_head_dim": None,
    "act_choices": None,
    "act_rank": None,
    # Rows of a token and one of its experts: each device has those of the experts that it holds.
    "act_expert_rows": ("data", "fsdp", "expert"),
}


@dataclass(frozen=True)
class RuleTable:
    """One parallel style: the rules for parameters and for activations."""

    name: str
    params: Mapping[str, Rule]
    acts: Mapping[str, Rule]

    def without(self, axis: str) -> RuleTable:
        """The same rules for a mesh in which this axis splits nothing."""

        def kept(rules: Mapping[str, Rule]) -> dict[str, Rule]:
            left = {dim: tuple(a for a in axes or () if a != axis) for dim, axes in rules.items()}
            return {dim: axes or None for dim, axes in left.items()}

        return RuleTable(self.name, kept(self.params), kept(self.acts))


STYLES = {
    # Parameters split over `fsdp`, and over `expert`, which splits experts by their number and all else like
    # `fsdp`; activations over the batch.
    "fsdp": RuleTable(
        "fsdp",
        params={
            "vocab": None,
            "embed": ("fsdp", "expert"),
            "heads": None,
            "kv_heads": None,
            "mlp": None,
            "norm": None,
            "layers": None,
            "router": None,
            "experts": ("expert",),
            "expert_mlp": None,
            "expert_embed": ("fsdp",),
            "rank": None,
        },
        acts={
            **_BATCH_RULES,
            "act_heads": None,
            "act_kv_heads": None,
            "act_mlp": None,
            "act_expert_mlp": None,
            "act_vocab": None,
        },
    ),
    # The same, with heads, MLP and vocabulary split over `tensor` (Megatron-LM, arXiv:1909.08053).
    "fsdp+tensor": RuleTable(
        "fsdp+tensor",
        params={
            "vocab": ("tensor",),
            "embed": ("fsdp", "expert"),
            "heads": ("tensor",),
            "kv_heads": ("tensor",),
            "mlp": ("tensor",),
            "norm": None,
            "layers": None,
            "router": None,
            "experts": ("expert",),
            "expert_mlp": ("tensor",),
            "expert_embed": ("fsdp",),
            "rank": None,
        },
        acts={
            **_BATCH_RULES,
            "act_heads": ("tensor",),
            "act_kv_heads": ("tensor",),
            "act_mlp": ("tensor",),
            "act_expert_mlp": ("tensor",),
            "act_vocab": ("tensor",),
        },
    ),
}


def spec_of(dims: Sequence[str], rules: Mapping[str, Rule]) -> Spec:
    """The spec of a tensor with these dims. Raises KeyError for a dim that the rules do not name."""
    spec = tuple(rules[dim] or () for dim in dims)
    used = [axis for axes in spec for axis in axes]
    assert len(used) == len(set(used)), f"one mesh axis twice in the spec of {dims}: {spec}"
    return spec


def param_specs(table: Iterable[ParamRow], rules: RuleTable) -> dict[str, Spec]:
    """Row name -> spec, for every row of a parameter table."""
    return {row.name: spec_of(row.dims, rules.params) for row in table}


def split_count(axes: Iterable[str], axis_sizes: Mapping[str, int]) -> int:
    """Into how many pieces these axes split a dim."""
    return math.prod(axis_sizes[axis] for axis in axes)


def shard_slices(shape: Sequence[int], spec: Spec, axis_sizes: Mapping[str, int]) -> list[tuple[slice, ...]]:
    """The slice of a tensor held at each mesh position, positions in row-major order of AXES.

    shape: elements per dim, every split dim divisible by its pieces.
    """
    pieces = [split_count(axes, axis_sizes) for axes in spec]
    assert all(n % p == 0 for n, p in zip(shape, pieces, strict=True)), f"{shape} does not divide by {pieces}"
    found = []
    for position in itertools.product(*(range(axis_sizes[axis]) for axis in AXES)):
        at = dict(zip(AXES, position, strict=True))
        slices = []
        for size, axes, count in zip(shape, spec, pieces, strict=True):
            index = 0
            for axis in axes:
                index = index * axis_sizes[axis] + at[axis]
            step = size // count
            slices.append(slice(index * step, (index + 1) * step))
        found.append(tuple(slices))
    return found


def table_problems(
    table: Sequence[ParamRow], rules: RuleTable, axis_sizes: Mapping[str, int]
) -> list[Problem]:
    """What is wrong between a parameter table, a rule table and the mesh, in both directions."""
    problems = []
    table_dims = {dim for row in table for dim in row.dims}
    listed = ", ".join(sorted(rules.params))
    for dim in sorted(table_dims - set(rules.params)):
        rule = f"has no entry for the dim {dim!r} of the parameter table"
        problems.append(Problem("mesh.rules", rules.name, rule, f"entries: {listed}", f"a rule for {dim!r}"))
    used_axes: set[str] = set()
    for dim, axes in [*rules.params.items(), *rules.acts.items()]:
        for axis in axes or ():
            used_axes.add(axis)
            if axis not in AXES:
                rule = f"maps {dim!r} to the axis {axis!r}, which the mesh does not have"
                problems.append(
                    Problem("mesh.rules", rules.name, rule, f"axes: {', '.join(AXES)}", "one of them")
                )
    for axis, size in axis_sizes.items():
        if size > 1 and axis not in used_axes:
            other = f"style {rules.name!r} uses {', '.join(sorted(used_axes))}"
            styles = [name for name, style in STYLES.items() if _uses(style, axis)]
            fix = f"1, or mesh.rules={styles[0]}" if styles else "1"
            problems.append(Problem(f"mesh.{axis}", size, "splits nothing under these rules", other, fix))
    return problems


def _uses(style: RuleTable, axis: str) -> bool:
    return any(axis in (axes or ()) for axes in [*style.params.values(), *style.acts.values()])
