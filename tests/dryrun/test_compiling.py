"""Real compiles by the libtpu that is installed, for slices that are not there.

TPTRAIN_LIBTPUS, folders that other versions were installed into (divided by colons), adds those compilers.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tptrain.dryrun import compiling
from tptrain.dryrun.compiling import CompileRequest, compile_program
from tptrain.dryrun.libtpu import RUN_VERSION, installed_libtpu, libtpu_at
from tptrain.errors import ProblemsError
from tptrain.program.compiled import CompiledProgram
from tptrain.topology import parse_topology

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = [None, *(Path(path) for path in os.environ.get("TPTRAIN_LIBTPUS", "").split(":") if path)]
GIB = 2**30

Ask = Callable[..., CompileRequest]


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-m", "tests.dryrun.programs", str(folder)], check=True, cwd=ROOT, env=env
    )
    return folder


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def ask(programs: Path) -> Ask:
    """Makes a request for one of the programs; the step for v5e-4 where nothing else is said."""

    def make(name: str = "step", **changes: Any) -> CompileRequest:
        usual: dict[str, Any] = {
            "hlo_proto": (programs / f"{name}.pb").read_bytes(),
            "topology": parse_topology("v5e-4"),
            "axis_sizes": {"fsdp": 2, "tensor": 2},
            "device_order": (0, 1, 2, 3),
            "xla_flags": {},
            "libtpu": None,
            "attention_density": 0.5,
        }
        return CompileRequest(**{**usual, **changes})

    return make


@pytest.mark.parametrize("libtpu", COMPILERS)
def test_a_train_step(ask: Ask, shared_cache: Path, libtpu: Path | None) -> None:
    program = compile_program(ask(libtpu=libtpu), shared_cache)
    assert (program.outcome, program.message) == ("compiled", "")
    memory, cost = program.memory, program.cost
    assert memory and cost
    # A quarter of both fp32 weights; 12 rows of bfloat16 lie in tiles of 16.
    weights = 2 * 3 * 512 * 1280 * 4 // 4
    assert memory.argument_bytes == weights + 16 * 512 * 2
    assert memory.aliased_bytes == weights and program.aliased_parameters == (0, 1)
    assert memory.peak_bytes - memory.argument_bytes < 2**20
    # Per layer two products forward, and two for each backward, on a quarter of the numbers.
    assert cost.matmul_flops == 3 * 2 * 3 * (2 * 24 * 512 * 1280) // 4
    assert cost.estimated_cycles > cost.matmul_cycles > cost.matmul_flops / 131_072
    assert cost.notices == ()


@pytest.mark.parametrize("libtpu", COMPILERS)
def test_the_collectives_of_a_train_step(ask: Ask, shared_cache: Path, libtpu: Path | None) -> None:
    cost = compile_program(ask(libtpu=libtpu), shared_cache).cost
    assert cost is not None
    table = {(use.kind, use.axes): use for use in cost.collectives if use.dtype == "bf16"}
    gather = table["all-gather", ("fsdp",)]
    # Two weights a layer, forward and backward; each chip sends its quarter, cast before it travels.
    assert (gather.executions, gather.num_bytes) == (12, 4 * 3 * (512 * 1280 // 4) * 2)
    scatter = table["reduce-scatter", ("fsdp",)]
    assert scatter.num_bytes == 2 * 3 * (512 * 1280 // 2) * 2 / 2
    reduce = table["all-reduce", ("tensor",)]
    assert (reduce.executions, reduce.num_bytes) == (6, 6 * 2 * (12 * 512 * 2) / 2)
    assert 0 < cost.exposed_seconds <= cost.communication_seconds
    assert set(table) == {
        ("all-gather", ("fsdp",)),
        ("reduce-scatter", ("fsdp",)),
        ("all-reduce", ("tensor",)),
    }


def test_the_same_compile_is_read_from_the_cache(
    ask: Ask, shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compile_program(ask(), shared_cache)
    started: list[object] = []
    monkeypatch.setattr(compiling, "_run_child", lambda *what: started.append(what) or -9)
    began = time.monotonic()
    again = compile_program(ask(), shared_cache)
    assert time.monotonic() - began < 1
    assert again == replace(first, cached=True) and not started
    others = [
        {"xla_flags": {"xla_tpu_scoped_vmem_limit_kib": "32768"}},
        {"device_order": (1, 0, 2, 3)},
        {"axis_sizes": {"data": 2, "tensor": 2}},
        {"attention_density": 0.25},
        {"hlo_proto": ask().hlo_proto + b"\0"},
    ]
    for number, changes in enumerate(others, start=1):
        assert compile_program(ask(**changes), shared_cache).outcome == "killed"
        assert len(started) == number, changes


def test_a_damaged_cache_file_is_replaced(ask: Ask, tmp_path: Path) -> None:
    first = compile_program(ask("batched"), tmp_path)
    (stored,) = tmp_path.iterdir()
    stored.write_text(stored.read_text()[:500])
    again = compile_program(ask("batched"), tmp_path)
    assert not again.cached and again.cost == first.cost
    assert [path.name for path in tmp_path.iterdir()] == [stored.name]
    assert compile_program(ask("batched"), tmp_path).cached


@pytest.mark.parametrize("libtpu", COMPILERS)
def test_products_over_batch_dims(ask: Ask, shared_cache: Path, libtpu: Path | None) -> None:
    program = compile_program(ask("batched", libtpu=libtpu), shared_cache)
    assert program.cost and program.cost.matmul_flops == 2 * (6 * 4 * 40 * 48 * 56) // 4


@pytest.mark.parametrize("libtpu", COMPILERS)
def test_out_of_memory_is_data(ask: Ask, shared_cache: Path, libtpu: Path | None) -> None:
    names = ("rows", "model.up.weight")
    program = compile_program(ask("too_large", libtpu=libtpu, parameter_names=names), shared_cache)
    assert program.outcome == "out_of_memory" and program.shortage
    assert program.memory is None and program.cost is None
    assert "needs 28.00 GiB of HBM on each chip; 15.75 GiB are available" in program.message
    assert program.shortage.needed_bytes == pytest.approx(28 * GIB, rel=1e-4)
    assert program.shortage.available_bytes == parse_topology("v5e-4").chip.hbm_bytes
    # Both matrices, both results, and both matrices gathered in bfloat16.
    large = [(one.kind, one.num_bytes // GIB) for one in program.largest_buffers if one.num_bytes >= GIB]
    assert sorted(large) == [*[("argument", 5)] * 2, *[("output", 4)] * 2, *[("temporary", 5)] * 2]
    arguments = [one.name for one in program.largest_buffers if one.kind == "argument"]
    assert sorted(arguments) == ["model.up.weight", "rows"]
    assert {"jit(f)/dot_general"} <= {one.name for one in program.largest_buffers if one.kind == "output"}


def test_collectives_keep_their_axis_on_a_permuted_order(ask: Ask, tmp_path: Path) -> None:
    """The compiler gets the devices in mesh order, and its groups are places of the mesh."""
    order = (5, 2, 7, 0, 3, 6, 1, 4)
    topology = parse_topology("v5e-8")
    asked = ask("step_4x2", topology=topology, axis_sizes={"fsdp": 4, "tensor": 2}, device_order=order)
    program = compile_program(asked, tmp_path / "cache", dump_dir=tmp_path / "dump")
    assert program.outcome == "compiled", program.message
    (options,) = (tmp_path / "dump").glob("*execution_options.txt")
    assigned = [int(number) for number in re.findall(r"replica_device_ids: (\d+)", options.read_text())]
    assert assigned == [topology.devices()[position].id for position in order]
    assert program.cost is not None
    table = {(use.kind, use.axes, use.group_size) for use in program.cost.collectives if use.dtype == "bf16"}
    assert ("all-gather", ("fsdp",), 4) in table and ("all-reduce", ("tensor",), 2) in table
    (assignment,) = (tmp_path / "dump").glob("*buffer-assignment.txt")
    in_hbm = re.findall(
        r"^allocation \d+: size (\d+)(?:, page \d+)?, preallocated-temp", assignment.read_text(), re.M
    )
    assert program.memory and program.memory.temporary_bytes == sum(map(int, in_hbm))
    # 4 chips gather a weight of which each has an eighth.
    (gather,) = (use for use in program.cost.collectives if use.kind == "all-gather")
    assert gather.num_bytes == 4 * 3 * (512 * 1280 // 8) * 2 * 3


def test_two_slices(ask: Ask, tmp_path: Path) -> None:
    asked = ask(
        "step_4x2",
        topology=parse_topology("2xv5e-4"),
        axis_sizes={"fsdp": 4, "tensor": 2},
        device_order=tuple(range(8)),
    )
    cost = compile_program(asked, tmp_path).cost
    assert cost is not None
    networks = {(use.network, use.axes) for use in cost.collectives if use.dtype == "bf16"}
    assert networks == {("DCN", ("fsdp",)), ("ICI", ("fsdp",)), ("ICI", ("tensor",))}


@pytest.mark.parametrize("name", ["v4-8", "v6e-4"])
def test_other_chips(ask: Ask, tmp_path: Path, name: str) -> None:
    program = compile_program(ask(topology=parse_topology(name)), tmp_path)
    assert program.outcome == "compiled", program.message
    assert program.cost and program.cost.matmul_flops == 3 * 2 * 3 * (2 * 24 * 512 * 1280) // 4


@pytest.mark.parametrize(("name", "wraps"), [("v5p-128", {"x", "y", "z"}), ("v6e-16", set())])
def test_what_is_in_force(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wraps: set[str]
) -> None:
    """The slice's rings and the request's flags, and nothing from the caller's environment."""
    for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        monkeypatch.setenv(variable, "--xla_no_such_flag=1")
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/nowhere")
    monkeypatch.setenv("WRAP", "nonsense")
    topology = parse_topology(name)
    flags = {"xla_tpu_enable_async_collective_fusion": "false"}
    asked = ask(
        "unsharded",
        topology=topology,
        axis_sizes={"fsdp": topology.num_devices},
        device_order=tuple(range(topology.num_devices)),
        xla_flags=flags,
    )
    program = compile_program(asked, tmp_path / "cache", dump_dir=tmp_path / "dump")
    assert program.outcome == "compiled", program.message
    assert program.flags == flags
    (arguments,) = (tmp_path / "dump").glob("*target_arguments.txt")
    rings = re.search(r"wrap \{([^}]*)\}", arguments.read_text())
    assert rings and set(re.findall(r"(\w): true", rings[1])) == wraps
    (in_force,) = (tmp_path / "dump").glob("*tpu_comp_env.txt")
    assert "xla_tpu_enable_async_collective_fusion: false" in in_force.read_text()


def test_text_in_an_unknown_form_leaves_a_notice(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child's dump is cut off after the compile."""
    code = (
        "import pathlib, sys\n"
        "from tptrain.jaxside import aot_compile as child\n"
        "child.main()\n"
        "for path in pathlib.Path(sys.argv[1], child.DUMP).glob('*after_codegen.txt'):\n"
        "    path.write_text(path.read_text()[:-300])"
    )
    monkeypatch.setattr(compiling, "_command", lambda work: [sys.executable, "-c", code, str(work)])
    program = compile_program(ask("batched"), tmp_path)
    assert program.outcome == "compiled" and program.memory and program.cost is None
    assert any("could not be read" in notice for notice in program.notices)


def test_an_unknown_flag_is_named(ask: Ask, tmp_path: Path) -> None:
    program = compile_program(ask(xla_flags={"xla_tpu_no_such_flag": "1"}), tmp_path)
    assert program.outcome == "refused"
    assert "knows no flag 'xla_tpu_no_such_flag'" in program.message


def test_a_long_refusal_is_cut(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Pallas kernel lowered for a newer compiler is refused with the whole kernel printed."""
    said = "INTERNAL: Failed to deserialize the Mosaic module: expected <= 7 but got 8" + "\nmodule" * 9999
    result = {"error": "compile", "message": said}
    code = f"import json, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(json.dumps({result!r}))"
    monkeypatch.setattr(
        compiling, "_command", lambda work: [sys.executable, "-c", code, str(work / "result.json")]
    )
    program = compile_program(ask(), tmp_path)
    assert program.outcome == "refused" and len(program.message) < 1000
    assert "expected <= 7 but got 8" in program.message and program.message.endswith("...")


def test_a_slice_that_libtpu_cannot_describe(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libtpu describes every slice that tptrain knows, so the child asks it for another one."""
    code = (
        "from tptrain.jaxside import aot_compile as child\n"
        "real = child.topology_desc_arguments\n"
        "child.topology_desc_arguments = lambda topology: {**real(topology), 'topology_name': 'v5e:3x3'}\n"
        "child.main()"
    )
    monkeypatch.setattr(compiling, "_command", lambda work: [sys.executable, "-c", code, str(work)])
    program = compile_program(ask(), tmp_path)
    assert program.outcome == "no_topology"
    assert "cannot describe v5e-4: INVALID_ARGUMENT" in program.message and "--libtpu PATH" in program.message


def children() -> list[int]:
    """Processes that this one has started to compile."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat, command = (folder / "stat").read_text(), (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        if int(stat.rpartition(")")[2].split()[1]) == os.getpid() and b"aot_compile" in command:
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize(
    ("sent", "outcome", "said"),
    [
        (signal.SIGKILL, "killed", "probably for lack of host memory"),
        (signal.SIGSEGV, "crashed", "ended by SIGSEGV"),
    ],
)
def test_a_killed_compiler_is_told(
    ask: Ask, tmp_path: Path, sent: signal.Signals, outcome: str, said: str
) -> None:
    results: list[CompiledProgram] = []
    asked = ask("too_large")
    thread = threading.Thread(target=lambda: results.append(compile_program(asked, tmp_path / "cache")))
    thread.start()
    while not (pids := children()):
        assert thread.is_alive()
        time.sleep(0.01)
    os.kill(pids[0], sent)
    thread.join(timeout=30)
    (program,) = results
    assert program.outcome == outcome and said in program.message
    assert not (tmp_path / "cache").exists(), "what may pass another time is not kept"


def test_a_compiler_ends_with_the_process_that_waits_for_it() -> None:
    """Whatever ends that process, it cannot take its child along itself."""
    child = (
        "from tptrain.jaxside.aot_compile import die_with_parent; die_with_parent();"
        " print('ready', flush=True); import time; time.sleep(60)"
    )
    parent = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', sys.argv[1]],"
        " stdout=subprocess.PIPE, text=True); child.stdout.readline();"
        " print(child.pid, flush=True); child.wait()"
    )
    started = subprocess.Popen([sys.executable, "-c", parent, child], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    place = Path("/proc") / started.stdout.readline().strip() / "cmdline"
    assert b"die_with_parent" in place.read_bytes()
    started.kill()
    started.wait()
    deadline = time.monotonic() + 10
    while place.exists() and b"die_with_parent" in place.read_bytes():
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)


def test_the_last_lines_of_a_crash_are_kept(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, sys; [print('line', i, file=sys.stderr) for i in range(40)];"
        " sys.stderr.flush(); os.abort()"
    )
    monkeypatch.setattr(compiling, "_command", lambda work: [sys.executable, "-c", code])
    program = compile_program(ask(), tmp_path)
    assert program.outcome == "crashed" and "ended by SIGABRT" in program.message
    assert "line 39" in program.message and "line 27" not in program.message


def test_time_is_limited(ask: Ask, tmp_path: Path) -> None:
    program = compile_program(ask("too_large", timeout_seconds=0.3), tmp_path)
    assert program.outcome == "timed_out" and not children()


def test_without_libtpu_it_says_what_to_install(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "installed_libtpu", lambda: None)
    program = compile_program(ask(), tmp_path)
    assert program.outcome == "no_libtpu" and "pip install 'tptrain[aot]'" in program.message


def test_a_path_without_libtpu_is_refused(ask: Ask, tmp_path: Path) -> None:
    with pytest.raises(ProblemsError, match=r"libtpu=.*must be libtpu.so or a folder"):
        compile_program(ask(libtpu=tmp_path), tmp_path)


def test_a_dump_does_not_mix_with_another(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "old.after_codegen.txt").touch()
    with pytest.raises(ProblemsError, match=r"dump_dir=.*must be empty"):
        compile_program(ask(), tmp_path / "cache", dump_dir=tmp_path)


def test_libtpu_is_found_by_any_of_its_paths() -> None:
    installed = installed_libtpu()
    assert installed and re.fullmatch(r"\d+\.\d+\.\d+", installed.version)
    for path in (installed.library, installed.library.parent, installed.library.parent.parent):
        assert libtpu_at(path).version == installed.version


def test_the_version_of_a_run_is_that_of_pyproject() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["tpu"] == extras["aot"] == [f"libtpu=={RUN_VERSION}"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"axis_sizes": {"fsdp": 4, "tensor": 2}}, "mesh=4x2.*devices=4 in v5e-4"),
        ({"device_order": (0, 1, 2, 2)}, "device_order=4 places.*each device once"),
        ({"topology": parse_topology("cpu-4")}, "topology=cpu-4.*must be a TPU topology"),
    ],
)
def test_what_does_not_belong_together_is_refused(ask: Ask, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ProblemsError, match=said):
        ask(**changes)
