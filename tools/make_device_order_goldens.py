"""Writes tests/golden/device_order/*.json: device lists and mesh orders from libtpu itself, no TPU needed.

    python tools/make_device_order_goldens.py             write the files
    python tools/make_device_order_goldens.py --stdout    print the same as one JSON object, by file name

libtpu may abort its process, so tests run this as a child. Run from the repository root, with tptrain
installed or PYTHONPATH=. set; libtpu has to be installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

GOLDEN_DIR = Path(__file__).resolve().parents[1] / "tests" / "golden" / "device_order"

# Topology -> mesh shapes, each as (sizes within a slice, sizes over slices).
Sizes = tuple[tuple[int, ...], tuple[int, ...]]
CASES: dict[str, tuple[Sizes, ...]] = {
    "v4-32": (((16,), (1,)), ((4, 4), (1, 1)), ((2, 8), (1, 1)), ((2, 2, 4), (1, 1, 1))),
    "v5p-16": (((8,), (1,)), ((2, 4), (1, 1)), ((4, 2), (1, 1)), ((2, 2, 2), (1, 1, 1))),
    "v5p-32": (((16,), (1,)), ((4, 4), (1, 1)), ((2, 8), (1, 1)), ((1, 8, 1, 2), (1, 1, 1, 1))),
    "v5p-256": (((128,), (1,)), ((32, 4), (1, 1)), ((16, 8), (1, 1)), ((4, 16, 2), (1, 1, 1))),
    "v5e-16": (((16,), (1,)), ((4, 4), (1, 1)), ((2, 8), (1, 1)), ((2, 2, 4), (1, 1, 1))),
    "v6e-8": (((8,), (1,)), ((2, 4), (1, 1)), ((4, 2), (1, 1))),
    "v6e-256": (
        ((256,), (1,)),
        ((64, 4), (1, 1)),
        ((32, 8), (1, 1)),
        ((16, 16), (1, 1)),
        ((4, 16, 4), (1, 1, 1)),
    ),
    "2xv5p-32": (
        ((16, 1), (2, 1)),
        ((4, 4), (2, 1)),
        ((4, 4), (1, 2)),
        ((2, 8), (2, 1)),
        ((1, 4, 4), (2, 1, 1)),
    ),
    "2xv6e-16": (((16, 1), (2, 1)), ((4, 4), (2, 1)), ((8, 2), (1, 2))),
}

_ENVIRONMENT = {
    # libtpu asks the metadata server of a TPU VM what it runs on unless it is told.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-32",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_PLATFORMS": "cpu",
    # Another process may hold libtpu's lock file; nothing here touches a device.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stdout", action="store_true", help="print instead of writing the files")
    arguments = parser.parse_args()
    os.environ.update(_ENVIRONMENT)
    goldens = {name: golden(name) for name in CASES}
    if arguments.stdout:
        json.dump(goldens, sys.stdout)
        return 0
    GOLDEN_DIR.mkdir(parents=True, exist_ok=True)
    for name, content in goldens.items():
        (GOLDEN_DIR / f"{name}.json").write_text(render(content), encoding="utf-8")
    print(f"wrote {len(goldens)} files to {GOLDEN_DIR}")
    return 0


def golden(name: str) -> dict[str, Any]:
    """libtpu's devices of one topology and the order of each mesh on them, as plain data."""
    from jax.experimental import topologies

    from tptrain.jaxside.device_order import topology_desc_arguments
    from tptrain.topology import parse_topology

    described = topology_desc_arguments(parse_topology(name))
    devices: list[Any] = topologies.get_topology_desc(**described).devices
    versions = {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}
    return {
        "topology": name,
        "versions": versions,
        "get_topology_desc": {key: list(v) if isinstance(v, tuple) else v for key, v in described.items()},
        "device_kind": sorted({device.device_kind for device in devices}),
        "device_columns": ["slice_index", "coords", "core", "process_index", "id"],
        "devices": [
            # A single slice's devices have no slice_index.
            [getattr(d, "slice_index", 0), list(d.coords), d.core_on_chip, d.process_index, d.id]
            for d in devices
        ],
        "orders": [order(devices, ici, dcn) for ici, dcn in CASES[name]],
    }


def order(devices: list[Any], ici: tuple[int, ...], dcn: tuple[int, ...]) -> dict[str, Any]:
    """One mesh: positions in `devices` in mesh order, and whether a side of the slice had to be split."""
    from jax.experimental import mesh_utils

    def create(split: bool) -> Any:
        if max(dcn) == 1:
            return mesh_utils.create_device_mesh(ici, devices, allow_split_physical_axes=split)
        return mesh_utils.create_hybrid_device_mesh(ici, dcn, devices, allow_split_physical_axes=split)

    try:
        mesh, split = create(split=False), False
    except NotImplementedError:
        mesh, split = create(split=True), True
    position = {device: index for index, device in enumerate(devices)}
    return {"ici": ici, "dcn": dcn, "split": split, "order": [position[device] for device in mesh.flat]}


def render(content: dict[str, Any]) -> str:
    """JSON with one device, and one mesh, a line."""
    lines = []
    for key, value in content.items():
        if key in ("devices", "orders"):
            items = ",\n".join(f"    {json.dumps(item)}" for item in value)
            lines.append(f'  "{key}": [\n{items}\n  ]')
        else:
            lines.append(f'  "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
