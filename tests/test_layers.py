"""Imports inside the package point one way, and each framework has the one place that may import it.

The source is parsed, so an import inside a function counts like one at the top.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tptrain

PACKAGE = Path(tptrain.__file__).parent

# Parts that plan a run; a laptop without any framework can import them.
PLANNING = (
    *("errors", "untrusted", "hf_files", "chips", "topology", "family", "mesh", "config", "estimate"),
    *("program", "report"),
)
# A part of the package may import itself and the parts before it.
LAYERS = (
    *PLANNING,
    *("heap", "models", "data", "inspection", "weights"),
    *("jaxside", "backends", "ckpt", "export", "generate", "convert", "eval", "train"),
    *("dryrun", "cli", "__main__"),
)
# These import the modules of a folder of their own part, which are checked like all others.
FINDERS = ("family/registry.py",)
FRAMEWORKS = ("torch", "torch_xla", "jax", "jaxlib", "flax", "orbax", "transformers", "numpy", "optax")

# Top-level module -> the only places that may import it: parts, or files of a part.
OWNERS = {
    "jax": ("jaxside", "ckpt"),
    "jaxlib": ("jaxside", "ckpt"),
    "flax": ("jaxside", "ckpt"),
    "orbax": ("jaxside", "ckpt"),
    "torch_xla": ("backends/xla", "backends/make.py"),
    "torch.distributed": ("backends",),
}


def sources() -> dict[str, ast.Module]:
    """Path inside the package -> its syntax tree."""
    found = {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(), str(path))
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    return {name: tree for name, tree in found.items() if name != "__init__.py"}


def imports(name: str, tree: ast.Module) -> Iterator[str]:
    """Every module that a file imports; `from a import b` gives both `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name}: imports are written in full"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            computed = called in ("import_module", "__import__") and name not in FINDERS
            assert not computed, f"{name}: imports by a computed name"


def part_of(file: str) -> str:
    """`ckpt/bridge.py` -> `ckpt`, `cli.py` -> `cli`."""
    return file.split("/")[0].removesuffix(".py")


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def upward_imports(files: dict[str, ast.Module]) -> list[str]:
    """Imports of a later part, as sentences."""
    found = []
    for file, tree in files.items():
        for module in imports(file, tree):
            parts = module.split(".")
            if parts[0] != "tptrain" or len(parts) < 2 or parts[1] == "__version__":
                continue
            if LAYERS.index(parts[1]) > LAYERS.index(part_of(file)):
                found.append(f"{file} imports {module}")
    return found


def foreign_imports(files: dict[str, ast.Module]) -> list[str]:
    """Imports of a framework outside the places that own it."""
    found = []
    for file, tree in files.items():
        for module in imports(file, tree):
            for owned, owners in OWNERS.items():
                inside = any(file == owner or file.startswith(f"{owner}/") for owner in owners)
                if is_inside(module, owned) and not inside:
                    found.append(f"{file} imports {module}")
            if part_of(file) in PLANNING and module.split(".")[0] in FRAMEWORKS:
                found.append(f"{file} imports {module}")
    return found


def test_every_part_has_its_place() -> None:
    parts = {part_of(file) for file in sources()}
    assert parts == set(LAYERS), "a new part of the package needs a place in LAYERS"


def test_imports_point_one_way() -> None:
    assert upward_imports(sources()) == []


def test_each_framework_is_imported_by_its_owners_alone() -> None:
    assert foreign_imports(sources()) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("mesh/rules.py", "from tptrain import config"),
        ("models/decoder.py", "def f():\n    import tptrain.backends.base"),
        ("weights/hf_json.py", "from tptrain.train.loop import Loop"),
    ],
)
def test_an_import_upwards_is_found(file: str, line: str) -> None:
    assert upward_imports({file: ast.parse(line)})


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("train/loop.py", "import torch_xla.core.xla_model as xm"),
        ("train/loop.py", "from torch import distributed"),
        ("train/step.py", "def f():\n    import torch.distributed as dist"),
        ("backends/torch_backend.py", "from torch_xla import runtime"),
        ("backends/xla/backend.py", "import jax.numpy as jnp"),
        ("config/plan.py", "from numpy import float32"),
        ("errors.py", "import torch"),
    ],
)
def test_a_framework_in_the_wrong_place_is_found(file: str, line: str) -> None:
    assert foreign_imports({file: ast.parse(line)})


def test_planning_loads_no_framework() -> None:
    """The same at run time, where it also holds for what the libraries beneath import."""
    code = (
        "import sys, tptrain.config.planning, tptrain.config.recipe_file, tptrain.report.plan_page\n"
        f"print([name for name in {FRAMEWORKS} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
