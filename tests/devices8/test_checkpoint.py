"""Checkpoints: any mesh and plain JAX read what one mesh saved, bit for bit, by Hugging Face name."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from tests import small
from tptrain.backends.base import HostShards, Tensors
from tptrain.backends.shards import host_shards
from tptrain.backends.xla.backend import XlaBackend
from tptrain.ckpt.arrays import to_numpy, to_torch
from tptrain.ckpt.bridge import JaxSource, to_jax
from tptrain.ckpt.checkpointer import Checkpointer
from tptrain.ckpt.reading import StepReader
from tptrain.ckpt.restoring import restore_part
from tptrain.ckpt.steps import find_step, saved_steps
from tptrain.config import Plan
from tptrain.config.state_parts import PARAMS
from tptrain.errors import ProblemsError
from tptrain.family import ParamRow, stored_rows
from tptrain.jaxside.specs import jax_mesh
from tptrain.mesh import shard_slices

PERMUTED = (6, 2, 7, 3, 4, 0, 5, 1)
IDENTITY = tuple(range(8))
STEP, RUN = 7, {"step": 7, "cursor": 56, "seeds": {"data": 3}}


@dataclasses.dataclass(frozen=True)
class Saved:
    """A step on disk and the whole, unpadded tensors that went into it: part -> row name -> tensor."""

    folder: Path
    expected: dict[str, Tensors]

    @property
    def step_folder(self) -> Path:
        return self.folder / str(STEP)


def anything(run: object) -> None:
    """Accepts every `run` item."""


def random_parts(plan: Plan, seed: int = 0) -> dict[str, Tensors]:
    """Other random tensors in every part, none of them zero anywhere."""
    generator = torch.Generator().manual_seed(seed)
    return {
        part: {row.name: torch.randn(row.size, generator=generator) + 5 for row in stored_rows(plan.table)}
        for part in plan.parts
    }


def placed(backend: Any, parts: dict[str, Tensors]) -> dict[str, Tensors]:
    return {part: backend.place(small.DictSource(tensors)) for part, tensors in parts.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Saved from a 4x2 mesh whose devices are permuted and whose vocabulary is padded by one row."""
    plan = small.small_plan(4, 2)
    backend, expected = XlaBackend(plan, PERMUTED), random_parts(plan)
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpointer = Checkpointer(plan, backend, folder)
    checkpointer.save(STEP, placed(backend, expected), RUN)
    checkpointer.wait()
    checkpointer.close()
    return Saved(folder, expected)


@pytest.fixture
def close() -> Iterator[list[Checkpointer]]:
    """Checkpointers to close when a test is over."""
    opened: list[Checkpointer] = []
    yield opened
    for checkpointer in opened:
        checkpointer.close()


def assert_holds(whole: Tensors, expected: Tensors, padded_vocab: int) -> None:
    """Rows in memory equal those on disk, and what the vocabulary is padded with is zero."""
    assert set(whole) == set(expected)
    for name, theirs in expected.items():
        ours, rows = whole[name], theirs.shape[0]
        assert torch.equal(ours[:rows], theirs), name
        assert not ours[rows:].any(), f"padding of {name}"
    assert whole["lm_head.weight"].shape[0] == padded_vocab


@pytest.mark.parametrize(
    ("data", "fsdp", "tensor", "order"),
    [
        (1, 2, 4, PERMUTED),
        (1, 8, 1, IDENTITY),
        (1, 1, 8, IDENTITY),
        (1, 4, 2, PERMUTED),
        (2, 2, 2, PERMUTED),
        (8, 1, 1, IDENTITY),
    ],
    ids=["2x4", "8x1", "1x8", "4x2", "2x2x2", "replicas"],
)
def test_every_mesh_restores_the_same_bits(
    data: int, fsdp: int, tensor: int, order: tuple[int, ...], saved: Saved, close: list[Checkpointer]
) -> None:
    plan = small.small_plan(fsdp, tensor, data)
    backend = XlaBackend(plan, order)
    close.append(checkpointer := Checkpointer(plan, backend, saved.folder))
    assert saved_steps(saved.folder) == [STEP]
    restored = checkpointer.restore(STEP, tuple(plan.parts), anything)
    assert restored.run == RUN
    for part in plan.parts:
        buffers = restored.parts[part]
        assert set(buffers) == set(backend.layout.buffers)
        assert_holds(small.whole_rows(backend, plan, buffers), saved.expected[part], plan.padded_vocab)


TORCH_READER = """
import sys, numpy as np, torch
from pathlib import Path
from tests import small
from tptrain.backends.torch_backend import TorchBackend
from tptrain.ckpt.checkpointer import Checkpointer

folder, step, file = sys.argv[1:]
plan = small.torch_plan()
reader = Checkpointer(plan, TorchBackend(plan), Path(folder))
restored = reader.restore(int(step), tuple(plan.parts), lambda run: None)
names = {f"{part}/{name}": tensor for part, rows in restored.parts.items() for name, tensor in rows.items()}
expected = np.load(file)
assert set(names) == set(expected)
assert all(np.array_equal(names[name].numpy(), expected[name]) for name in names)
print("read", restored.run["cursor"])
"""


def run_reader(code: str, saved: Saved, folder: Path, cwd: Path, *arguments: str) -> list[str]:
    """What a program prints in a process of its own; its last argument is a file of what was saved."""
    parts = saved.expected.items()
    arrays = {f"{part}/{name}": t.numpy() for part, tensors in parts for name, t in tensors.items()}
    np.savez(folder / "expected.npz", **arrays)
    command = [sys.executable, "-c", code, *arguments, str(folder / "expected.npz")]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.split()


def test_the_torch_backend_restores_the_same_bits(saved: Saved, tmp_path: Path) -> None:
    """In a process with one device, as the torch backend has."""
    root = Path(small.__file__).parents[1]
    arguments = (str(saved.folder), str(STEP))
    assert run_reader(TORCH_READER, saved, tmp_path, root, *arguments) == ["read", str(RUN["cursor"])]


def test_a_restored_tensor_lies_where_the_plan_says(saved: Saved) -> None:
    """Restored buffers are split as placed ones are: position p holds slice p, nothing is replicated."""
    plan = small.small_plan(2, 4)
    backend = XlaBackend(plan, PERMUTED)
    held = host_shards(backend, restore_part(plan, backend, saved.step_folder, PARAMS, "resume"))
    for row in stored_rows(plan.table):
        slices = shard_slices(row.padded_size, plan.specs[row.name], plan.mesh.axis_sizes)
        for position, piece in held[row.name].shards.items():
            assert list(piece.shape) == [part.stop - part.start for part in slices[position]], row.name


def test_the_step_reader_reads_single_tensors(saved: Saved) -> None:
    folder = find_step(saved.folder.parent, "run")
    assert folder == saved.step_folder
    reader = StepReader(folder)
    assert reader.run == RUN
    for row in stored_rows(small.small_plan(8, 1).table):
        assert torch.equal(reader.read(row), saved.expected[PARAMS][row.name]), row.name


PLAIN_READER = """
import sys, jax, numpy as np, orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
step, file = sys.argv[1:]
mesh = Mesh(np.array(jax.devices()), ("x",))
reader = ocp.StandardCheckpointer()
for part in ("params", "mu", "nu"):
    expected = {n[len(part) + 1 :]: a for n, a in np.load(file).items() if n.startswith(part + "/")}
    tree = reader.metadata(step + "/" + part).item_metadata.tree
    assert set(tree) == set(expected), sorted(set(tree) ^ set(expected))
    assert {n: tuple(m.shape) for n, m in tree.items()} == {n: a.shape for n, a in expected.items()}
    split = NamedSharding(mesh, PartitionSpec(None, "x")), NamedSharding(mesh, PartitionSpec())
    wanted = {
        n: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=split[0 if len(m.shape) == 2 else 1])
        for n, m in tree.items()
    }
    for name, array in reader.restore(step + "/" + part, wanted).items():
        assert array.dtype == "float32" and np.array_equal(np.asarray(array), expected[name]), name
        assert len(array.sharding.device_set) == 2
assert "model.layers.2.self_attn.q_proj.weight" in tree and tree["lm_head.weight"].shape == (1031, 120)
loaded = sorted({m.split(".")[0] for m in sys.modules} & {"tptrain", "torch", "torch_xla", "transformers"})
assert not loaded, loaded
print("read", len(tree))
"""


def test_plain_jax_reads_a_step_without_this_package(saved: Saved, tmp_path: Path) -> None:
    """Hugging Face names, unpadded shapes, equal bits, on a mesh that this package never saw."""
    printed = run_reader(PLAIN_READER, saved, tmp_path, tmp_path, str(saved.step_folder))
    assert printed == ["read", str(len(saved.expected[PARAMS]))]


def add_one(state: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
    return {name: tensor + inputs["one"] for name, tensor in state.items()}, {}


def test_steps_go_on_while_a_save_is_written(tmp_path: Path, close: list[Checkpointer]) -> None:
    """The very buffers that are being saved are donated to steps as soon as `save` returns."""
    plan = small.small_plan(4, 2)
    backend, expected = XlaBackend(plan, PERMUTED), random_parts(plan, seed=1)
    state = {f"{p}/{n}": t for p, buffers in placed(backend, expected).items() for n, t in buffers.items()}
    inputs = backend.put_scalars({"one": 1.0})
    specs = {name: backend.layout.buffers[name.split("/")[1]].spec for name in state}
    step = backend.compile_step(add_one, state, inputs, specs)
    close.append(checkpointer := Checkpointer(plan, backend, tmp_path / "checkpoints"))
    parts: dict[str, Tensors] = {part: {} for part in plan.parts}
    for name, tensor in state.items():
        part, _, buffer = name.partition("/")
        parts[part][buffer] = tensor
    checkpointer.save(1, parts, {"step": 1})
    for _ in range(20):
        state, _ = step(state, inputs)
    backend.sync()
    checkpointer.wait()
    norm = small.whole_rows(backend, plan, {"model.norm.weight": state["params/model.norm.weight"]})
    moved = norm["model.norm.weight"] - expected["params"]["model.norm.weight"]
    assert torch.allclose(moved, torch.full_like(moved, 20.0), atol=1e-3), "the steps did run"
    for part, buffers in checkpointer.restore(1, tuple(plan.parts), anything).parts.items():
        assert_holds(small.whole_rows(backend, plan, buffers), expected[part], plan.padded_vocab)


def test_a_step_of_another_model_is_refused_with_every_difference(
    saved: Saved, close: list[Checkpointer]
) -> None:
    """One layer more, a wider MLP, biases, and a tied head: all that is missing, extra or misshapen."""
    config = small.small_config(
        num_hidden_layers=4, intermediate_size=184, mlp_bias=True, tie_word_embeddings=True
    )
    plan = small.small_plan(2, 4, config=config)
    close.append(checkpointer := Checkpointer(plan, XlaBackend(plan, IDENTITY), saved.folder))
    with pytest.raises(ProblemsError) as error:
        checkpointer.restore(STEP, tuple(plan.parts), anything)
    theirs = {name: f"{list(t.shape)} float32" for name, t in saved.expected[PARAMS].items()}
    ours = {row.name: f"{list(row.size)} float32" for row in stored_rows(plan.table)}
    different = {name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name)}
    assert len(different) == 3 * 3 + (9 + 3) + 3 * 3 + 1
    problems = {problem.rule.split()[0].removeprefix("params/"): problem for problem in error.value.problems}
    problems = {name: problem for name, problem in problems.items() if "/" not in name}
    assert set(problems) == different
    assert len(error.value.problems) == len(plan.parts) * len(different)
    for name, problem in problems.items():
        assert problem.setting == "resume" and problem.value == saved.step_folder
        assert f"must be {ours.get(name, 'nothing')} " in problem.rule
        assert problem.other == f"checkpoint has {theirs.get(name, 'nothing')}"


def test_a_step_that_was_never_saved_is_refused(saved: Saved, close: list[Checkpointer]) -> None:
    plan = small.small_plan(2, 4)
    close.append(checkpointer := Checkpointer(plan, XlaBackend(plan, IDENTITY), saved.folder))
    with pytest.raises(ProblemsError, match=r"resume=8: must be a step that was saved \(.*: 7\)"):
        checkpointer.restore(8, tuple(plan.parts), anything)


# The bridge, on bfloat16, which numpy does not know.


def every_bfloat16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_bfloat16_survives_numpy_bit_for_bit() -> None:
    values = every_bfloat16()
    array = to_numpy(values)
    assert array.dtype.name == "bfloat16" and array.shape == (2**16,)
    one = to_numpy(torch.tensor([1.0, -2.5], dtype=torch.bfloat16))
    assert one.astype(np.float32).tolist() == [1.0, -2.5]
    back = to_torch(array)
    assert back.dtype == torch.bfloat16
    assert torch.equal(back.view(torch.int16), values.view(torch.int16))


@pytest.mark.parametrize("size", [(1032, 64), (1031, 64)], ids=["whole", "padded"])
def test_a_bfloat16_row_survives_jax_bit_for_bit(size: tuple[int, int]) -> None:
    plan = small.small_plan(4, 2)
    spec, sizes = (("tensor",), ("fsdp",)), plan.mesh.axis_sizes
    row = ParamRow("w", ("vocab", "embed"), size, (1032, 64), storage_dtype="bfloat16")
    full = every_bfloat16().repeat(2)[: 1032 * 64].reshape(1032, 64).clone()
    full[size[0] :] = 0
    slices = shard_slices(row.padded_size, spec, sizes)
    held = HostShards(row.padded_size, spec, {p: full[s].clone() for p, s in enumerate(slices)})
    array = to_jax(row, held, jax_mesh(plan.mesh), sizes)
    assert isinstance(array, jax.Array) and array.dtype == jax.numpy.bfloat16 and array.shape == size
    source = JaxSource({"w": array})
    for here in shard_slices(row.padded_size, spec, sizes):
        inside = tuple(slice(s.start, min(s.stop, n)) for s, n in zip(here, size, strict=True))
        piece = source.read(row, inside)
        assert piece.dtype == torch.bfloat16
        assert torch.equal(piece.view(torch.int16), full[inside].view(torch.int16))


def test_the_readmes_snippet_reads_the_weights_in_plain_jax(saved: Saved, tmp_path: Path) -> None:
    """As printed in README.md, in a process with two devices and without tptrain or torch."""
    readme = (Path(small.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (snippet,) = [
        part.split("```")[0]
        for part in readme.split("```python\n")[1:]
        if "StandardCheckpointer" in part and "flax" not in part
    ]
    there = "/path/to/runs/tiny_gsm8k/checkpoints/100/params"
    assert there in snippet
    code = snippet.replace(there, str(saved.step_folder / "params")) + (
        "import sys\n"
        "import numpy as np\n"
        "assert not {'torch', 'tptrain'} & set(sys.modules)\n"
        "assert jax.device_count() == len(params['model.norm.weight'].sharding.device_set) == 2\n"
        "assert not params['lm_head.weight'].sharding.is_fully_replicated\n"
        "expected = np.load(sys.argv[1])\n"
        "assert all(np.array_equal(params[n], expected[f'params/{n}']) for n in params)\n"
        "print(len(params))\n"
    )
    count = len(saved.expected["params"])
    assert run_reader(code, saved, tmp_path, tmp_path) == [str(count)]
