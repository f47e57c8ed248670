"""The axes of the device mesh, in JAX's terms: each has an ICI size (inside a slice) and a DCN size."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tptrain.errors import Problem

# Outermost first. `tensor` is innermost so that its devices, which talk most, are neighbours.
AXES = ("data", "fsdp", "expert", "context", "tensor")

# Axes that may span slices. The others exchange activations inside a layer, too much for DCN.
DCN_AXES = ("data", "fsdp")


@dataclass(frozen=True)
class MeshShape:
    """A fully resolved mesh. `ici` and `dcn` hold one size per axis, in the order of AXES."""

    ici: tuple[int, ...]
    dcn: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.ici) == len(self.dcn) == len(AXES)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Devices along each axis, over all slices."""
        return tuple(i * d for i, d in zip(self.ici, self.dcn, strict=True))

    @property
    def axis_sizes(self) -> dict[str, int]:
        return dict(zip(AXES, self.sizes, strict=True))

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes)

    def describe(self) -> str:
        """`fsdp=4 x tensor=2`; axes of size 1 are left out."""
        named = [f"{axis}={size}" for axis, size in self.axis_sizes.items() if size > 1]
        return " x ".join(named) or "one device"


def fill_axes(
    sizes: dict[str, int], total: int, setting: str, total_name: str
) -> tuple[dict[str, int], list[Problem]]:
    """Replace the one -1 in `sizes` so that the product is `total`; report what cannot work.

    setting:    how an axis is written in a recipe, with a place for its name: "mesh.{}" or "mesh.dcn_{}".
    total_name: what the product must equal, for the message: "devices per slice".
    """
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    problems = [
        Problem(
            setting.format(axis), size, "must be a whole number above 0, or -1", f"{total_name}={total}", "-1"
        )
        for axis, size in sizes.items()
        if size < 1 and size != -1
    ]
    if len(open_axes) > 1:
        names = ", ".join(setting.format(axis) for axis in open_axes)
        rule = "at most one axis may be -1"
        problems.append(Problem(names, -1, rule, f"{len(open_axes)} are", f"-1 for {open_axes[0]} only"))
    if problems:
        return sizes, problems
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and total % fixed == 0:
        return {**sizes, open_axes[0]: total // fixed}, []
    if not open_axes and fixed == total:
        return sizes, []
    return sizes, [_product_problem(sizes, total, fixed, setting, total_name, bool(open_axes))]


def _product_problem(
    sizes: dict[str, int], total: int, fixed: int, setting: str, total_name: str, filling: bool
) -> Problem:
    """The problem of axes whose product is not (or does not divide) the number of devices."""
    large = [axis for axis, size in sizes.items() if size > 1] or list(sizes)[:1]
    rule = "product of the axes must divide" if filling else "product of the axes must equal"
    biggest = max(large, key=lambda axis: sizes[axis])
    rest = math.prod(size for axis, size in sizes.items() if size != -1 and axis != biggest)
    passing = [d for d in range(1, total + 1) if total % d == 0]
    if filling:
        fits = [d for d in passing if total % (rest * d) == 0]
    else:
        fits = [d for d in passing if rest * d == total]
    if fits:
        fix = f"{setting.format(biggest)}={' or '.join(str(d) for d in fits)}"
    else:
        fix = f"{setting.format('fsdp')}=-1 and every other axis 1"
    names = ", ".join(setting.format(axis) for axis in large)
    values = " x ".join(str(sizes[axis]) for axis in large)
    return Problem(names, values, f"{rule} the {total_name}", f"product {fixed}, {total_name}={total}", fix)
