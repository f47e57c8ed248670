"""Compiling a train step for a slice that is not there, in a process of its own, with the outcome as data."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tptrain.dryrun.child import child_environment, last_lines
from tptrain.dryrun.compile_cache import CompileCache, default_cache_dir
from tptrain.dryrun.compiled_text import Dump
from tptrain.dryrun.libtpu import RUN_VERSION, Libtpu, installed_libtpu, libtpu_at
from tptrain.errors import Problem, raise_if_any, refuse
from tptrain.program.compiled import CompiledProgram, Memory, Outcome
from tptrain.program.device_groups import MeshPlaces
from tptrain.topology import Topology

# Names of the files that the child reads and writes; the same as in tptrain.jaxside.aot_compile, which this
# process does not import because it imports jax.
_CHILD = "tptrain.jaxside.aot_compile"
_REQUEST, _PROGRAM, _RESULT, _DUMP = "request.json", "program.pb", "result.json", "dump"


@dataclass(frozen=True)
class CompileRequest:
    """A program, and what to compile it for.

    hlo_proto:    a serialized HloModuleProto before partitioning, with shardings.
    axis_sizes:   mesh axis -> size, outermost first; those of size 1 may be left out.
    device_order: position in `topology.devices()` of each place of the mesh, row-major.
    xla_flags:    flags of the TPU compiler by name, without dashes: {"xla_tpu_...": "true"}.
    libtpu:       another compiler than the installed one: see `libtpu_at`.
    attention_density: part of all (query, key) pairs that the attention mask leaves; 0.5 for a causal mask.
    parameter_names: names of the program's parameters in order, for the report of large buffers.
    donated: numbers of the parameters that the program may write its results into.

    Raises ProblemsError for a mesh or an order that is not of that topology.
    """

    hlo_proto: bytes
    topology: Topology
    axis_sizes: Mapping[str, int]
    device_order: tuple[int, ...]
    xla_flags: Mapping[str, str]
    libtpu: Path | None
    attention_density: float
    parameter_names: tuple[str, ...] = ()
    donated: tuple[int, ...] = ()
    timeout_seconds: float = 3600.0

    def __post_init__(self) -> None:
        raise_if_any(list(_problems(self)))


def compile_program(
    request: CompileRequest, cache_dir: Path | None = None, dump_dir: Path | None = None
) -> CompiledProgram:
    """Compile, or read the outcome of the same compile from the cache.

    cache_dir: where outcomes are kept; the user's cache folder by default. dump_dir: an empty or new folder
    to leave XLA's dump in; the cache is then not asked, because it keeps no dump.

    What the compiler does is returned, also when it crashes. Raises ProblemsError for a wrong path.
    """
    if dump_dir is not None and dump_dir.is_dir() and any(dump_dir.iterdir()):
        rule = "must be empty, because all in it is read as the dump of this compile"
        raise refuse("dump_dir", dump_dir, rule, "it has files", "a new folder")
    libtpu = libtpu_at(request.libtpu) if request.libtpu else installed_libtpu()
    if libtpu is None:
        fix = "no TPU compiler is installed: pip install 'tptrain[aot]', or name one with --libtpu PATH"
        return _outcome(request, None, "no_libtpu", fix)
    cache = CompileCache(cache_dir or default_cache_dir())
    key = cache.key(request.hlo_proto, _cache_parts(request, libtpu))
    if dump_dir is None and (known := cache.read(key)):
        return known
    with tempfile.TemporaryDirectory(prefix="tptrain-compile-") as scratch:
        work = Path(scratch)
        dump = dump_dir.absolute() if dump_dir else work / _DUMP
        program = _compiled_in(work, dump, request, libtpu)
    try:
        cache.write(key, program)
    except OSError as error:
        notice = f"the result could not be kept in {cache.folder}: {error.strerror or error}"
        program = replace(program, notices=(*program.notices, notice))
    return program


def _problems(request: CompileRequest) -> list[Problem]:
    topology, found = request.topology, []
    devices = f"devices={topology.num_devices} in {topology.name}"
    if topology.chip.platform != "tpu":
        rule = "must be a TPU topology to be compiled for"
        found.append(Problem("topology", topology.name, rule, "platform=cpu", "a TPU slice, as v5p-32"))
    sizes = "x".join(str(size) for size in request.axis_sizes.values())
    if math.prod(request.axis_sizes.values()) != topology.num_devices:
        rule = "the product of the mesh's axes must equal the number of devices"
        found.append(Problem("mesh", sizes, rule, devices, f"sizes whose product is {topology.num_devices}"))
    if sorted(request.device_order) != list(range(topology.num_devices)):
        rule = "must name each device once"
        fix = "the order that tptrain.jaxside.device_order gives"
        found.append(Problem("device_order", f"{len(request.device_order)} places", rule, devices, fix))
    return found


def _cache_parts(request: CompileRequest, libtpu: Libtpu) -> dict[str, Any]:
    return {
        "topology": request.topology.name,
        "axes": list(request.axis_sizes.items()),
        "order": request.device_order,
        "flags": dict(request.xla_flags),
        "libtpu": libtpu.identity,
        "attention_density": request.attention_density,
        "parameter_names": request.parameter_names,
        "donated": request.donated,
    }


def _outcome(
    request: CompileRequest, libtpu: Libtpu | None, outcome: Outcome, message: str, **fields: Any
) -> CompiledProgram:
    return CompiledProgram(
        outcome=outcome,
        message=message,
        topology=request.topology.name,
        axis_sizes=dict(request.axis_sizes),
        libtpu=libtpu.version if libtpu else "none",
        libtpu_build=fields.pop("libtpu_build", ""),
        flags=dict(request.xla_flags),
        compile_seconds=fields.pop("compile_seconds", 0.0),
        peak_host_bytes=fields.pop("peak_host_bytes", 0),
        **fields,
    )


def _compiled_in(work: Path, dump: Path, request: CompileRequest, libtpu: Libtpu) -> CompiledProgram:
    asked = {
        "topology": request.topology.name,
        "order": request.device_order,
        "flags": dict(request.xla_flags),
        "donated": request.donated,
    }
    (work / _REQUEST).write_text(json.dumps(asked))
    (work / _PROGRAM).write_bytes(request.hlo_proto)
    dump.mkdir(parents=True, exist_ok=True)
    code = _run_child(work, _environment(request, libtpu, dump), request.timeout_seconds)
    if code is None:
        message = f"the compile was not done after {request.timeout_seconds:.0f} s and was stopped"
        return _outcome(request, libtpu, "timed_out", message)
    if code != 0:
        return _outcome(request, libtpu, *_death(code, work / "stderr"))
    return _read_result(json.loads((work / _RESULT).read_text()), dump, request, libtpu)


def _environment(request: CompileRequest, libtpu: Libtpu, dump: Path) -> dict[str, str]:
    """The child's environment: nothing that steers XLA or libtpu is taken over from the caller's."""
    steering = (
        *("XLA_", "LIBTPU_", "TPU_", "JAX_", "PJRT_", "CPU_NUM_DEVICES", "MEGASCALE_"),
        # libtpu reads the slice's shape from these too, which a TPU VM may have in its environment.
        *("WRAP", "ALT", "HOST_BOUNDS", "CHIPS_PER_HOST_BOUNDS"),
    )
    return {
        **child_environment(os.environ, steering),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_dump_to={dump} --xla_dump_hlo_as_text=true",
        "TPU_LIBRARY_PATH": str(libtpu.library),
        "TPU_ACCELERATOR_TYPE": request.topology.accelerator_type,
        # Without these libtpu asks the cloud's metadata server for the slice it runs on, for minutes.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # A training run on this host holds libtpu's lock; compiling touches no chip.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def _command(work: Path) -> list[str]:
    return [sys.executable, "-m", _CHILD, str(work)]


def _run_child(work: Path, env: Mapping[str, str], timeout_seconds: float) -> int | None:
    """The child's exit code, minus the signal that ended it; None when its time was up."""
    with (work / "stdout").open("wb") as out, (work / "stderr").open("wb") as err:
        child = subprocess.Popen(
            _command(work),
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
            cwd=work,
            env=env,
            start_new_session=True,
        )
        try:
            return child.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Also on Ctrl-C here: the child is a session of its own, which the terminal does not reach.
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def _death(code: int, stderr: Path) -> tuple[Outcome, str]:
    """How the child ended, and what it said last."""
    if code == -signal.SIGKILL:
        message = (
            "the compiler was killed by the system (SIGKILL), probably for lack of host memory: close other"
            " programs, or compile on a host with more memory"
        )
        return "killed", message
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    lines = last_lines(stderr.read_text(errors="replace"))
    said = "\n  ".join(["its last lines:", *lines]) if lines else "it said nothing"
    return "crashed", f"the compiler ended {how}; {said}"


def _read_result(
    result: Mapping[str, Any], dump: Path, request: CompileRequest, libtpu: Libtpu
) -> CompiledProgram:
    measured = {
        "libtpu_build": result.get("build", ""),
        "compile_seconds": result.get("compile_seconds", 0.0),
        "peak_host_bytes": result.get("peak_host_bytes", 0),
    }
    if result.get("error") == "topology":
        message = (
            f"libtpu {libtpu.version} cannot describe {request.topology.name}: {result['message']}; use a"
            " smaller slice, or another libtpu with --libtpu PATH"
        )
        return _outcome(request, libtpu, "no_topology", message, **measured)
    if result.get("error") == "compile":
        program = _outcome(request, libtpu, "refused", result["message"], **measured)
    else:
        program = _outcome(request, libtpu, "compiled", "", memory=Memory(**result["memory"]), **measured)
    if libtpu.version != RUN_VERSION:
        notice = f"compiled by libtpu {libtpu.version}; a run loads {RUN_VERSION}"
        program = replace(program, notices=(notice,))
    mesh = MeshPlaces(request.topology, request.axis_sizes, request.device_order)
    return Dump(dump, mesh, request.attention_density, request.parameter_names).add_to(program)
