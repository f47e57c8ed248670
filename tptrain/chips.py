"""What one chip of each TPU generation can do: plain numbers, each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
# - Host memory: of machine types, in GB, over their chips: 384 over 8 and 192 over 4 (ct5lp-hightpu, the page
#   on v5e); 407 over 4 (ct4p-hightpu-4t), 448 over 4 (ct5p-hightpu-4t), 720 over 4 and 1440 over 8
#   (ct6e-standard) by copies of Google's table of machine types that others publish.
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
TPUS = (V4, V5E, V5P, V6E)
CHIPS: dict[str, Chip] = {chip.name: chip for chip in (*TPUS, CPU)}
