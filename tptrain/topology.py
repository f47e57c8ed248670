"""Accelerators by name: what a chip can do, and how the chips of a slice are laid out.

    parse_topology("v5p-32")        16 chips: the number counts TensorCores, and a v5p or v4 chip has two
    parse_topology("v5e-16")        16 chips: v5e and v6e count chips; `v5litepod-16` is the same slice
    parse_topology("v5p:4x4x8")     a shape, in chips; v5e and v6e have two dimensions: "v6e:16x16"
    parse_topology("2xv5p-32")      two slices, joined by the data centre network: slices first, as in the
                                    names XPK and MaxText give to several slices
    parse_topology("cpu-8")         eight virtual CPU devices in one process, for runs without a TPU

Plain data, so that a laptop can plan for any slice. A device is what JAX and torch_xla call one: a chip,
whose two TensorCores (v4, v5p) work as one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tptrain.errors import ProblemsError, nearest, refuse

Shape = tuple[int, int, int]

_GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One kind of chip. Numbers are per chip; None where there is no number, or none with a source.

    name:              as in a topology's name: "v5p".
    generation:        TPU generation; 0 for virtual CPU devices.
    device_kind:       what JAX calls the device. (Pathways says "TPU v5p" where TPU VMs and libtpu say
                       "TPU v5"; tptrain follows the latter.)
    hbm_bytes:         what the compiler lets one program use, its arguments included. Less than the size on
                       the data sheet, because libtpu keeps some for itself.
    peak_bf16_flops_per_second: of matrix multiplication in bfloat16; a multiply-add is two.
    hbm_bytes_per_second:       between HBM and the chip.
    ici_link_bytes_per_second:  over one link to a neighbouring chip, in one direction.
    dcn_bytes_per_second:       a chip's share of its host's data centre network, in one direction.
    host_link_bytes_per_second: between a chip and the memory of its host, in one direction.
    host_memory_bytes:          a chip's share of its host's memory.
    clock_hertz:       of the TensorCores.
    mxu_flops_per_cycle: of all matrix units of the chip in bfloat16; a multiply-add is two.
    tensor_cores:      TensorCores; together they are one device.
    torus_dims:        dimensions of the network between chips: 3 or 2, and 0 for CPU devices.
    host_shape:        chips of one host in a slice of several hosts.
    one_host_chips:    the largest slice that one host serves.
    max_chips:         the largest slice.
    name_counts:       what the number in "v5p-32" counts.
    """

    name: str
    generation: int
    device_kind: str
    hbm_bytes: int | None
    peak_bf16_flops_per_second: float | None
    hbm_bytes_per_second: float | None
    ici_link_bytes_per_second: float | None
    dcn_bytes_per_second: float | None
    host_link_bytes_per_second: float | None
    host_memory_bytes: int | None
    clock_hertz: float | None
    mxu_flops_per_cycle: int | None
    tensor_cores: int
    torus_dims: int
    host_shape: Shape
    one_host_chips: int
    max_chips: int
    name_counts: Literal["TensorCores", "chips", "devices"]

    @property
    def platform(self) -> Literal["tpu", "cpu"]:
        """The platform in JAX's terms."""
        return "tpu" if self.generation else "cpu"

    @property
    def ici_links(self) -> int:
        """Links to neighbouring chips, two per dimension."""
        return 2 * self.torus_dims

    @property
    def cores_per_count(self) -> int:
        """By what a number of chips is multiplied to get the number in a name."""
        return self.tensor_cores if self.name_counts == "TensorCores" else 1


# Where the numbers come from:
# - hbm_bytes: the limit in libtpu 0.0.24's own message when it refuses a program that is too large
#   ("Used 200.00G of 95.74G hbm"), read with jax 0.7.1 and no TPU attached; G is GiB, to 0.01. Data sheets
#   say 95 (v5p), 16 (v5e), 32 (v6e) and 32 (v4).
# - peak FLOP/s, HBM bandwidth, torus, largest slice, chips per host: Google Cloud's pages on each version
#   (docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e). A host has four chips in a slice of several hosts;
#   one machine type of v5e and v6e has eight, and serves the eight-chip slice.
# - ICI: the same pages give both directions of all links together: 1200 GB/s over 6 (v5p), 400 over 4 (v5e),
#   800 over 4 (v6e). v4: "How to Scale Your Model" (jax-ml.github.io/scaling-book), part 2, which has the
#   same values as Google Cloud for the other three.
# - DCN: v5p 50 Gbit/s per chip; v5e 6.4 and v6e 25.6 Tbit/s per pod of 256 chips. The v4 page has no value.
# - Host link: the same book, part 2: PCIe with 16 GB/s each way for v4, about 15 for v5, 32 for v6e.
# - Host memory: of machine types, in GB, over their chips: 407 over 4 (ct4p-hightpu-4t), 448 over 4
#   (ct5p-hightpu-4t), 384 over 8 and 192 over 4 (ct5lp-hightpu), 720 over 4 and 1440 over 8 (ct6e-standard):
#   "Plan TPUs in GKE" (cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus).
# - Matrix units: the pages on v4, v5p and v5e give four MXUs to a TensorCore, the page on TPU architecture
#   128 x 128 multiply-adds a cycle to an MXU before v6e. The clocks are the peak over these: 1.05 GHz (also
#   in the TPU v4 paper, arXiv:2304.01433), 1.75 and 1.5. v6e is an inference: an MXU is 256 x 256, and only
#   four of them make the peak at a clock like v5p's; no page gives its clock.
# - Wraparound links: v4 and v5p close every dimension from a full 4x4x4 cube on (the pages on both); v5e and
#   v6e close a side of 16 chips ("How to Scale Your Model", part 2).
V4 = Chip(
    name="v4",
    generation=4,
    device_kind="TPU v4",
    hbm_bytes=int(30.75 * _GIB),
    peak_bf16_flops_per_second=275e12,
    hbm_bytes_per_second=1200e9,
    ici_link_bytes_per_second=45e9,
    dcn_bytes_per_second=None,
    host_link_bytes_per_second=16e9,
    host_memory_bytes=407_000_000_000 // 4,
    clock_hertz=1.05e9,
    mxu_flops_per_cycle=2 * 4 * 128 * 128 * 2,
    tensor_cores=2,
    torus_dims=3,
    host_shape=(2, 2, 1),
    one_host_chips=4,
    max_chips=4096,
    name_counts="TensorCores",
)
V5P = Chip(
    name="v5p",
    generation=5,
    device_kind="TPU v5",
    hbm_bytes=int(95.74 * _GIB),
    peak_bf16_flops_per_second=459e12,
    hbm_bytes_per_second=2765e9,
    ici_link_bytes_per_second=100e9,
    dcn_bytes_per_second=50e9 / 8,
    host_link_bytes_per_second=15e9,
    host_memory_bytes=448_000_000_000 // 4,
    clock_hertz=1.75e9,
    mxu_flops_per_cycle=2 * 4 * 128 * 128 * 2,
    tensor_cores=2,
    torus_dims=3,
    host_shape=(2, 2, 1),
    one_host_chips=4,
    max_chips=6144,
    name_counts="TensorCores",
)
V5E = Chip(
    name="v5e",
    generation=5,
    device_kind="TPU v5 lite",
    hbm_bytes=int(15.75 * _GIB),
    peak_bf16_flops_per_second=197e12,
    hbm_bytes_per_second=819e9,
    ici_link_bytes_per_second=50e9,
    dcn_bytes_per_second=6.4e12 / 256 / 8,
    host_link_bytes_per_second=15e9,
    host_memory_bytes=384_000_000_000 // 8,
    clock_hertz=1.5e9,
    mxu_flops_per_cycle=4 * 128 * 128 * 2,
    tensor_cores=1,
    torus_dims=2,
    host_shape=(2, 2, 1),
    one_host_chips=8,
    max_chips=256,
    name_counts="chips",
)
V6E = Chip(
    name="v6e",
    generation=6,
    device_kind="TPU v6 lite",
    hbm_bytes=int(31.25 * _GIB),
    peak_bf16_flops_per_second=918e12,
    hbm_bytes_per_second=1640e9,
    ici_link_bytes_per_second=100e9,
    dcn_bytes_per_second=25.6e12 / 256 / 8,
    host_link_bytes_per_second=32e9,
    host_memory_bytes=1_440_000_000_000 // 8,
    clock_hertz=1.75e9,
    mxu_flops_per_cycle=4 * 256 * 256 * 2,
    tensor_cores=1,
    torus_dims=2,
    host_shape=(2, 2, 1),
    one_host_chips=8,
    max_chips=256,
    name_counts="chips",
)
# The limit on virtual CPU devices is ours: past it, a typing error is likelier than a plan.
CPU = Chip(
    name="cpu",
    generation=0,
    device_kind="cpu",
    hbm_bytes=None,
    peak_bf16_flops_per_second=None,
    hbm_bytes_per_second=None,
    ici_link_bytes_per_second=None,
    dcn_bytes_per_second=None,
    host_link_bytes_per_second=None,
    host_memory_bytes=None,
    clock_hertz=None,
    mxu_flops_per_cycle=None,
    tensor_cores=1,
    torus_dims=0,
    host_shape=(1, 1, 1),
    one_host_chips=1024,
    max_chips=1024,
    name_counts="devices",
)
CHIPS: dict[str, Chip] = {chip.name: chip for chip in (V4, V5E, V5P, V6E, CPU)}

_ALIASES = {"v5litepod": "v5e"}
_SHAPES_2D: tuple[Shape, ...] = tuple(
    (x, y, 1) for x, y in ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
)
_SHAPES_BELOW_A_CUBE: tuple[Shape, ...] = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_CUBE_CHIPS = 64
_RING_2D = 16
# XPK's and MaxText's lists have a v5p slice for every number of 4x4x4 cubes up to 96, save those (67, 71,
# ...) whose only shape would be longer than this.
_LONGEST_DEFAULT_SIDE = 244
# Ids of several slices: libtpu starts slice s at (s + 1) times this; a single slice starts at 0.
_SLICE_ID_STEP = 100_000

_FORMS = "known forms: v4-16, v5p-32, v5e-16, v6e-256, v5p:4x4x8, v6e:16x16, 2xv5p-32, cpu-8"
_NAME = re.compile(
    r"(?:(?P<slices>\d+)x)?(?P<chip>[a-z][a-z0-9]*?)(?:-(?P<count>\d+)|:(?P<shape>\d+(?:x\d+)*))"
)


@dataclass(frozen=True)
class DeviceCoords:
    """One device: where it is, and what JAX calls it.

    slice_index:   0 for a single slice (JAX's devices then have no such attribute).
    coords:        (x, y, z) of the chip in its slice.
    core:          always 0 here: the TensorCores of a chip are one device.
    process_index: the host, counted over all slices.
    id:            JAX's id. Not a position: ids follow coordinates, the list of devices follows hosts.
    """

    slice_index: int
    coords: Shape
    core: int
    process_index: int
    id: int


@dataclass(frozen=True)
class Topology:
    """`num_slices` equal slices of `shape` chips each, joined by the data centre network (DCN)."""

    chip: Chip
    shape: Shape
    num_slices: int = 1

    @property
    def name(self) -> str:
        """The shortest name `parse_topology` reads back to this topology: "2xv5p-32", "v5p:4x4x16"."""
        slices = f"{self.num_slices}x" if self.num_slices > 1 else ""
        if _default_shape(self.chip, self.devices_per_slice) == self.shape:
            return f"{slices}{_count_name(self.chip, self.devices_per_slice)}"
        return f"{slices}{self.chip.name}:{self.shape_text}"

    @property
    def shape_text(self) -> str:
        """The shape of a slice as Google writes it: "2x2x4"; "4x4" where the network has two dimensions."""
        return _shape_text(self.chip, self.shape)

    @property
    def wraps(self) -> tuple[bool, bool, bool]:
        """Which dimensions of a slice's network are rings: the last chip has a link to the first."""
        if self.chip.torus_dims == 2:
            x, y, _ = self.shape
            return (x == _RING_2D, y == _RING_2D, False)
        closed = self.chip.torus_dims == 3 and all(side % 4 == 0 for side in self.shape)
        return (closed, closed, closed)

    @property
    def accelerator_type(self) -> str:
        """Google's name for one slice by size alone: "v5p-32", "v5litepod-16"."""
        name = _count_name(self.chip, self.devices_per_slice)
        return name.replace("v5e-", "v5litepod-")

    @property
    def devices_per_slice(self) -> int:
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_slices * self.devices_per_slice

    @property
    def host_shape(self) -> Shape:
        """The chips of one host. A slice that one host can serve is taken to be served by one."""
        return self.shape if self.devices_per_slice <= self.chip.one_host_chips else self.chip.host_shape

    @property
    def devices_per_host(self) -> int:
        return math.prod(self.host_shape)

    @property
    def hosts_per_slice(self) -> int:
        return self.devices_per_slice // self.devices_per_host

    @property
    def num_hosts(self) -> int:
        return self.num_slices * self.hosts_per_slice

    def devices(self) -> tuple[DeviceCoords, ...]:
        """All devices, in the order and with the ids of JAX's topology devices.

        Slice by slice, host by host, chip by chip, x running fastest at each level.
        """
        return tuple(self._walk())

    def _walk(self) -> Iterator[DeviceCoords]:
        width, depth, _ = self.shape
        host = self.host_shape
        grid: Shape = (self.shape[0] // host[0], self.shape[1] // host[1], self.shape[2] // host[2])
        for slice_index in range(self.num_slices):
            first_id = (slice_index + 1) * _SLICE_ID_STEP if self.num_slices > 1 else 0
            first_process = slice_index * self.hosts_per_slice
            for process, corner in enumerate(_points(grid)):
                for inside in _points(host):
                    x, y, z = (c * h + i for c, h, i in zip(corner, host, inside, strict=True))
                    device_id = first_id + x + width * (y + depth * z)
                    yield DeviceCoords(slice_index, (x, y, z), 0, first_process + process, device_id)


def larger_slices(topology: Topology) -> Iterator[Topology]:
    """Topologies of the same chip and number of slices with more chips a slice, smallest first."""
    for chips in _offered(topology.chip):
        shape = _default_shape(topology.chip, chips)
        if shape is not None and chips > topology.devices_per_slice:
            yield Topology(topology.chip, shape, topology.num_slices)


def parse_topology(text: str, setting: str = "topology") -> Topology:
    """The topology called `text`, in any of the forms at the top of this module.

    setting: what to call `text` in the error. Raises ProblemsError for what is not a slice Google offers.
    """
    found = _NAME.fullmatch(text)
    if found is None:
        raise _unreadable(text, setting)
    asked = _Asked(text, setting, slices=f"{found['slices']}x" if found["slices"] else "")
    chip = _chip(found["chip"], asked)
    num_slices = int(found["slices"] or 1)
    one_slice = text.removeprefix(asked.slices)
    if num_slices < 1:
        raise asked.refuse("must have at least one slice", f"slices={num_slices}", one_slice)
    if chip is CPU and asked.slices:
        rule = "virtual CPU devices are always one slice, so a number of slices has no meaning"
        raise asked.refuse(rule, f"slices={num_slices}", one_slice)
    if found["count"]:
        return Topology(chip, _shape_of_count(chip, int(found["count"]), asked), num_slices)
    return Topology(chip, _shape_of_text(chip, found["shape"], asked), num_slices)


@dataclass(frozen=True)
class _Asked:
    """What is being read, for the errors. slices: the "2x" of "2xv5p-32", or nothing."""

    text: str
    setting: str
    slices: str

    def refuse(self, rule: str, other: str, fix: str) -> ProblemsError:
        return refuse(self.setting, self.text, rule, other, fix)


def _points(shape: Shape) -> Iterator[Shape]:
    """Every (x, y, z) inside `shape`, x running fastest."""
    for z in range(shape[2]):
        for y in range(shape[1]):
            for x in range(shape[0]):
                yield (x, y, z)


def _default_shape(chip: Chip, chips: int) -> Shape | None:
    """The shape Google gives to a slice named by its size alone; None where there is no such slice.

    In three dimensions it is the shape most like a cube, made of whole 4x4x4 cubes from 64 chips on
    (cloud.google.com/tpu/docs/types-topologies); in two, the one shape of that size.
    """
    if not 1 <= chips <= chip.max_chips:
        return None
    if chip is CPU:
        return (chips, 1, 1)
    if chip.torus_dims == 2 or chips < _CUBE_CHIPS:
        listed = _SHAPES_2D if chip.torus_dims == 2 else _SHAPES_BELOW_A_CUBE
        return next((shape for shape in listed if math.prod(shape) == chips), None)
    if chips % _CUBE_CHIPS:
        return None
    sides = min(_boxes(chips // _CUBE_CHIPS), key=sum)
    shape = (4 * sides[0], 4 * sides[1], 4 * sides[2])
    return shape if shape[2] <= _LONGEST_DEFAULT_SIDE else None


def _boxes(cubes: int) -> Iterator[Shape]:
    """Every a <= b <= c with a * b * c == cubes."""
    for a in range(1, cubes + 1):
        if a**3 > cubes:
            return
        if cubes % a:
            continue
        rest = cubes // a
        yield from ((a, b, rest // b) for b in range(a, math.isqrt(rest) + 1) if rest % b == 0)


def _chip(name: str, asked: _Asked) -> Chip:
    """The chip of that name; "v5litepod" is v5e."""
    chip = CHIPS.get(_ALIASES.get(name, name))
    if chip is not None:
        return chip
    other = f"known chips: {', '.join(CHIPS)}"
    if name in ("tpu7x", "v7x", "tpu7", "v7"):
        rule = "is a TPU whose chips are two devices each, which tptrain does not support yet"
        raise asked.refuse(rule, other, "a v4, v5e, v5p or v6e slice, as v5p-32")
    guess = nearest(name, CHIPS)
    fix = asked.text.replace(name, guess, 1) if guess else ""
    if not _is_topology(fix):
        fix = "one of those chips, as in v5p-32"
    raise asked.refuse("names a chip that tptrain does not know", other, fix)


def _is_topology(text: str) -> bool:
    try:
        parse_topology(text)
    except ProblemsError:
        return False
    return True


def _unreadable(text: str, setting: str) -> ProblemsError:
    """The error for text of none of the known forms."""
    # XPK and gcloud take the number of slices as a setting of its own, so people also write it last.
    trailing = re.fullmatch(r"(?P<one>[a-z0-9]+-\d+)x(?P<slices>\d+)", text)
    if trailing:
        rule = "has the number of slices last; it goes first"
        return refuse(setting, text, rule, _FORMS, f"{trailing['slices']}x{trailing['one']}")
    known = ["cpu-8", "v5litepod-16"]
    for chip in (V4, V5E, V5P, V6E):
        known += [_count_name(chip, chips) for chips in _offered(chip)]
    guess = nearest(text.strip().lower().replace("_", "-"), known)
    fix = f"{guess!r} (did you mean it?)" if guess else "a name of one of those forms"
    return refuse(setting, text, "is not the name of a topology", _FORMS, fix)


def _count_name(chip: Chip, chips: int) -> str:
    return f"{chip.name}-{chips * chip.cores_per_count}"


def _offered(chip: Chip) -> list[int]:
    """The sizes, in chips, that a name can have."""
    return [chips for chips in range(1, chip.max_chips + 1) if _default_shape(chip, chips)]


def _shape_of_count(chip: Chip, count: int, asked: _Asked) -> Shape:
    """The shape of the slice called e.g. v5p-<count>."""
    chips, rest = divmod(count, chip.cores_per_count)
    shape = None if rest else _default_shape(chip, chips)
    if shape is not None:
        return shape
    if chip is CPU:
        raise asked.refuse("is not a number of virtual CPU devices", f"1 to {chip.max_chips}", "cpu-8")
    per_chip = ", two a chip" if chip.cores_per_count == 2 else ""
    other = f"the number counts {chip.name_counts}{per_chip}; sizes: {_sizes_text(chip)}"
    fix = " or ".join(asked.slices + name for name in _neighbours(chip, count))
    raise asked.refuse("is not a size Google offers", other, fix)


def _sizes_text(chip: Chip) -> str:
    if chip.torus_dims == 2:
        return ", ".join(str(chips) for chips in _offered(chip))
    largest = chip.max_chips * chip.cores_per_count
    return f"8, 16, 32, 64, and multiples of 128 up to {largest} whose longest side is at most 244 chips"


def _neighbours(chip: Chip, count: int) -> list[str]:
    """The offered names just below and just above `count`."""
    offered = _offered(chip)
    below = [chips for chips in offered if chips * chip.cores_per_count < count][-1:]
    above = [chips for chips in offered if chips * chip.cores_per_count > count][:1]
    return [_count_name(chip, chips) for chips in below + above]


def _shape_of_text(chip: Chip, shape_text: str, asked: _Asked) -> Shape:
    """The shape written e.g. 2x2x4, checked against what slices of that chip can look like."""
    sides = tuple(int(side) for side in shape_text.split("x"))
    if chip is CPU:
        raise asked.refuse("virtual CPU devices have no shape", "they form a line", "cpu-8")
    if chip.torus_dims == 2:
        listed = [shape for shape in _SHAPES_2D if sides in (shape, shape[:2])]
        if listed:
            return listed[0]
        other = f"shapes: {', '.join(_shape_text(chip, shape) for shape in _SHAPES_2D)}"
    else:
        if len(sides) == 3 and _is_slice_3d(chip, sides):
            return (sides[0], sides[1], sides[2])
        small = ", ".join(_shape_text(chip, shape) for shape in _SHAPES_BELOW_A_CUBE)
        other = f"shapes: {small}, and AxBxC with A<=B<=C, multiples of 4, up to {chip.max_chips} chips"
    fix = f"{asked.slices}{chip.name}:{_shape_text(chip, _nearest_shape(chip, sides))}"
    raise asked.refuse(f"is not a shape of {chip.name} slices", other, fix)


def _is_slice_3d(chip: Chip, sides: tuple[int, ...]) -> bool:
    if sides in _SHAPES_BELOW_A_CUBE:
        return True
    whole_cubes = all(side >= 4 and side % 4 == 0 for side in sides)
    return whole_cubes and list(sides) == sorted(sides) and math.prod(sides) <= chip.max_chips


def _nearest_shape(chip: Chip, sides: tuple[int, ...]) -> Shape:
    """The same sides in Google's order if that is a shape, else the default shape of the nearest size."""
    ordered = sorted(sides)
    if chip.torus_dims == 3 and len(ordered) == 3:
        a, b, c = ordered
        # 2x2x1 is the one shape that Google does not write in rising order.
        for candidate in ((a, b, c), (b, c, a)):
            if _is_slice_3d(chip, candidate):
                return candidate
    chips = math.prod(sides)
    shape = _default_shape(chip, min(_offered(chip), key=lambda size: abs(size - chips)))
    assert shape is not None, "every offered size has a default shape"
    return shape


def _shape_text(chip: Chip, shape: Shape) -> str:
    return "x".join(str(side) for side in shape[: chip.torus_dims or 1])
