"""Names of slices, their shapes and hosts, and what is refused."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from tptrain.chips import CHIPS
from tptrain.errors import ProblemsError
from tptrain.topology import Topology, parse_topology

# Google Cloud's tables: cloud.google.com/tpu/docs/v5p (shape, cores, hosts), v4, v5e and v6e (shape, chips),
# with the machine types of a slice's hosts: four chips each, and eight for the one-host v5e-8 and v6e-8.
GOOGLE = [
    ("v5p-8", "2x2x1", 4, 1),
    ("v5p-16", "2x2x2", 8, 2),
    ("v5p-32", "2x2x4", 16, 4),
    ("v5p-64", "2x4x4", 32, 8),
    ("v5p-128", "4x4x4", 64, 16),
    ("v5p-256", "4x4x8", 128, 32),
    ("v5p-512", "4x8x8", 256, 64),
    ("v5p-1024", "8x8x8", 512, 128),
    ("v5p-2048", "8x8x16", 1024, 256),
    ("v5p-4096", "8x16x16", 2048, 512),
    ("v5p-8192", "16x16x16", 4096, 1024),
    ("v5p-12288", "16x16x24", 6144, 1536),
    ("v4-8", "2x2x1", 4, 1),
    ("v4-16", "2x2x2", 8, 2),
    ("v4-32", "2x2x4", 16, 4),
    ("v4-64", "2x4x4", 32, 8),
    ("v4-512", "4x8x8", 256, 64),
    ("v4-1536", "8x8x12", 768, 192),
    ("v5litepod-1", "1x1", 1, 1),
    ("v5litepod-4", "2x2", 4, 1),
    ("v5litepod-8", "2x4", 8, 1),
    ("v5litepod-16", "4x4", 16, 4),
    ("v5e-32", "4x8", 32, 8),
    ("v5e-128", "8x16", 128, 32),
    ("v6e-8", "2x4", 8, 1),
    ("v6e-64", "8x8", 64, 16),
    ("v6e-256", "16x16", 256, 64),
]
# Sizes of odd shape in XPK (core/system_characteristics.py) and MaxText (accelerator_to_spec_map.py).
XPK = {
    "v5p-384": "4x4x12",
    "v5p-640": "4x4x20",
    "v5p-1152": "4x12x12",
    "v5p-3072": "8x12x16",
    "v5p-3456": "12x12x12",
    "v5p-5376": "8x12x28",
    "v5p-6400": "8x20x20",
    "v5p-7808": "4x4x244",
    "v5p-9216": "12x16x24",
    "v5p-9856": "4x28x44",
    "v5p-10368": "12x12x36",
    "v5p-11264": "8x16x44",
    "v5p-11520": "12x20x24",
    "v5p-12160": "4x20x76",
}


@pytest.mark.parametrize(("name", "shape", "chips", "hosts"), GOOGLE)
def test_sizes_have_googles_shapes_chips_and_hosts(name: str, shape: str, chips: int, hosts: int) -> None:
    topology = parse_topology(name)
    assert (topology.shape_text, topology.devices_per_slice, topology.num_hosts) == (shape, chips, hosts)
    assert topology.accelerator_type == name.replace("v5e-", "v5litepod-")


@pytest.mark.parametrize(("name", "shape"), XPK.items())
def test_sizes_of_odd_shape_match_xpk(name: str, shape: str) -> None:
    assert parse_topology(name).shape_text == shape


def test_two_spellings_of_a_slice_are_equal() -> None:
    assert parse_topology("v5p-32") == parse_topology("v5p:2x2x4")
    assert parse_topology("v5e-16") == parse_topology("v5litepod-16") == parse_topology("v5e:4x4")
    assert parse_topology("v6e:4x8x1") == parse_topology("v6e-32")
    assert parse_topology("1xv5p-32") == parse_topology("v5p-32")


@pytest.mark.parametrize("name", ["v5p-32", "v5p:4x4x16", "2xv5p-32", "12xv6e-256", "3xv5p:4x4x16", "cpu-8"])
def test_name_reads_back_to_the_same_topology(name: str) -> None:
    topology = parse_topology(name)
    assert topology.name == name
    assert parse_topology(topology.name) == topology


def test_slices_multiply_devices_and_hosts_and_continue_processes() -> None:
    topology = parse_topology("3xv5p-32")
    assert (topology.num_slices, topology.num_devices, topology.num_hosts) == (3, 48, 12)
    devices = topology.devices()
    assert [device.slice_index for device in devices] == [0] * 16 + [1] * 16 + [2] * 16
    assert [device.process_index for device in devices[::4]] == list(range(12))
    assert (devices[0].id, devices[17].id, devices[47].id) == (100_000, 200_001, 300_015)


def test_devices_go_host_by_host_while_ids_follow_coordinates() -> None:
    devices = parse_topology("v5e-16").devices()
    assert [device.id for device in devices[:8]] == [0, 1, 4, 5, 2, 3, 6, 7]
    assert devices[5].coords == (3, 0, 0)
    assert devices[5].process_index == 1


@pytest.mark.parametrize("name", ["v4-64", "v5p-640", "v6e-128", "2xv5e-8", "cpu-6"])
def test_every_chip_is_there_once_and_every_host_is_full(name: str) -> None:
    topology = parse_topology(name)
    devices = topology.devices()
    assert len(devices) == topology.num_devices
    assert len({(device.slice_index, device.coords) for device in devices}) == topology.num_devices
    assert len({device.id for device in devices}) == topology.num_devices
    per_host = [device.process_index for device in devices]
    assert sorted(set(per_host)) == list(range(topology.num_hosts))
    assert {per_host.count(host) for host in set(per_host)} == {topology.devices_per_host}


def test_virtual_cpu_devices_are_one_host_without_limits() -> None:
    topology = parse_topology("cpu-8")
    assert (topology.num_devices, topology.num_hosts, topology.chip.platform) == (8, 1, "cpu")
    assert topology.chip.hbm_bytes is None
    assert topology.chip.peak_bf16_flops_per_second is None
    assert [device.id for device in topology.devices()] == list(range(8))


def test_chip_numbers_agree_with_other_sources() -> None:
    # "How to Scale Your Model", part 2, gives rounded values of its own.
    book = {
        "v4": (2.75e14, 1.2e12, 4.5e10),
        "v5p": (4.59e14, 2.8e12, 1e11),
        "v5e": (1.97e14, 8.1e11, 5e10),
        "v6e": (9.20e14, 1.6e12, 1e11),
    }
    data_sheet_gib = {"v4": 32, "v5p": 96, "v5e": 16, "v6e": 32}
    for name, (flops, hbm, ici) in book.items():
        chip = CHIPS[name]
        assert chip.peak_bf16_flops_per_second == pytest.approx(flops, rel=0.01)
        assert chip.hbm_bytes_per_second == pytest.approx(hbm, rel=0.03)
        assert chip.ici_link_bytes_per_second == pytest.approx(ici)
        assert chip.hbm_bytes is not None
        assert 0.95 < chip.hbm_bytes / 2**30 / data_sheet_gib[name] < 1


@pytest.mark.parametrize(
    ("text", "says", "fix"),
    [
        ("v5p-33", "two a chip", "v5p-32 or v5p-64"),
        ("2xv5p-33", "two a chip", "2xv5p-32 or 2xv5p-64"),
        ("v5p-8576", "at most 244 chips", "v5p-8448 or v5p-8704"),
        ("v5p-4", "sizes: 8, 16", "v5p-8"),
        ("v5e-12", "counts chips", "v5e-8 or v5e-16"),
        ("v6e-512", "counts chips", "v6e-256"),
        ("v6e:4x2", "2x4", "v6e:2x4"),
        ("2xv5p:4x2x2", "A<=B<=C", "2xv5p:2x2x4"),
        ("v5p:1x2x2", "2x2x1", "v5p:2x2x1"),
        ("v5p:2x2x6", "multiples of 4", "v5p:2x2x4"),
        ("v5p:16x20x28", "up to 6144 chips", "v5p:16x16x24"),
        ("v4:4x4", "2x2x4", "v4:2x2x4"),
        ("v5e:3x5", "4x4", "v5e:4x4"),
        ("v5-32", "known chips: v4", "v5p-32"),
        ("v5p_32", "known forms", "'v5p-32'"),
        ("V5P-32", "known forms", "'v5p-32'"),
        ("v5p-32x2", "it goes first", "2xv5p-32"),
        ("0xv5p-32", "at least one slice", "v5p-32"),
        ("2xcpu-8", "one slice", "cpu-8"),
        ("cpu-0", "1 to 1024", "cpu-8"),
        ("cpu:2x4", "no shape", "cpu-8"),
    ],
)
def test_refusals_say_what_would_pass(text: str, says: str, fix: str) -> None:
    with pytest.raises(ProblemsError) as caught:
        parse_topology(text, setting="recipe.topology")
    (problem,) = caught.value.problems
    assert (problem.setting, problem.value) == ("recipe.topology", text)
    assert says in f"{problem.rule} ({problem.other})"
    assert problem.fix.startswith(fix)
    for name in fix.strip("'").split(" or "):
        assert isinstance(parse_topology(name), Topology)


@pytest.mark.parametrize("text", ["v7x-16", "tpu7x-8"])
def test_two_device_chips_are_refused_by_name(text: str) -> None:
    with pytest.raises(ProblemsError, match="two devices each, which tptrain does not support yet"):
        parse_topology(text)


@pytest.mark.parametrize(
    "text", ["", "v5p", "v5p-", "v5p-32 ", "auto", "v3-12", "h100-8", "-32", "2x", "v5p:2x2x"]
)
def test_unreadable_names_are_refused_with_the_forms_or_the_chips(text: str) -> None:
    with pytest.raises(ProblemsError, match=r"known (forms|chips)"):
        parse_topology(text)


def test_importing_loads_no_framework_and_a_large_slice_is_quick_to_describe() -> None:
    code = (
        "import sys\n"
        "from tptrain.topology import parse_topology\n"
        "assert len(parse_topology('4xv5p-12288').devices()) == 24576\n"
        "print([name for name in ('jax', 'torch', 'numpy', 'pydantic') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_no_size_is_offered_without_its_shape() -> None:
    """Every default shape multiplies to its size, and the number of v5p slices is XPK's up to 6144 chips."""
    v5p = [count for count in range(8, 12289, 8) if _is_offered(f"v5p-{count}")]
    assert len(v5p) == 94
    for count in v5p:
        topology = parse_topology(f"v5p-{count}")
        assert 2 * math.prod(topology.shape) == count


def _is_offered(name: str) -> bool:
    try:
        parse_topology(name)
    except ProblemsError:
        return False
    return True
