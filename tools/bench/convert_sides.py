"""The parts of tools/bench/convert.py, each in a process of its own: PART FOLDER CONFIG PAIRS; JSON out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tptrain.backends.make import make_backend, quiet_libraries
from tptrain.backends.xla.process import set_environment
from tptrain.jaxside.process import setup_jax
from tptrain.topology import parse_topology

DEVICES = 8
STEP = "run/checkpoints/1"

Config = Mapping[str, Any]


def main(part: str, folder: Path, config: Config, pairs: int) -> dict[str, Any]:
    quiet_libraries()
    devices = DEVICES if part == "cpu_gather" else 1
    set_environment(parse_topology(f"cpu-{devices}"), os.environ)
    setup_jax(devices)
    once: dict[str, Callable[[Path, Config], dict[str, Any]]]
    once = {"make": make, "memory": memory, "stages": stages}
    if part in once:
        return once[part](folder, config)
    yardsticks = {"cp": cp, "save_pretrained": save_pretrained, "cpu_gather": cpu_gather}
    return {"rounds": yardsticks[part](folder, config, pairs)}


def make(folder: Path, config: Config) -> dict[str, float]:
    """A checkpoint as training saves it: weights and two moments in float32."""
    from tptrain.ckpt.importing import write_step
    from tptrain.family import facts_from_config, parameter_table, stored_rows
    from tptrain.jaxside.random_init import RandomSource
    from tptrain.weights import complete_config
    from tptrain.weights.hf_json import write_json

    hf_config = complete_config({"model_type": "llama", **config}, "float32")
    table = parameter_table(facts_from_config(hf_config))
    (folder / STEP).parent.mkdir(parents=True)
    (folder / "run" / "assets").mkdir()
    write_json(folder / "run" / "assets" / "config.json", hf_config)
    # A step that names its source may be without a tokenizer.
    run = {"step": 1, "cursor": 8, "hf_config": hf_config, "source": {"name": "bench"}}
    params, mu, nu = (RandomSource(seed, 0.02) for seed in range(3))
    seconds = timed(lambda: write_step(folder / STEP, table, params, run, moments={"mu": mu, "nu": nu}))
    return {"seconds": seconds, "parameters": sum(row.num_elements for row in stored_rows(table))}


def convert(folder: Path) -> Path:
    from tptrain.export import export_step

    return export_step(folder / STEP, folder / "out", setting="OUT")


def memory(folder: Path, config: Config) -> dict[str, int]:
    """How much the peak of this process's memory is over what it has once everything is imported."""
    import jax

    import tptrain.export  # noqa: F401

    jax.devices()
    before = resident("VmRSS")
    convert(folder)
    shutil.rmtree(folder / "out")
    return {"growth": resident("VmHWM") - before}


def resident(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def cp(folder: Path, config: Config, pairs: int) -> list[dict[str, float]]:
    copy = folder / "copy"

    def copied() -> None:
        copy.mkdir()
        files = [str(path) for path in (folder / "out").glob("*.safetensors")]
        subprocess.run(["cp", *files, str(copy)], check=True)

    def synced() -> None:
        subprocess.run(["sync", *map(str, copy.iterdir())], check=True)

    rounds = []
    for _ in range(pairs + 1):
        row = {"convert": timed(lambda: convert(folder)), "cp": timed(copied)}
        row["cp_and_sync"] = row["cp"] + timed(synced)
        rounds.append(row)
        clear(folder)
    return rounds[1:]


def save_pretrained(folder: Path, config: Config, pairs: int) -> list[dict[str, float]]:
    """transformers with the model in memory in float32: cast every tensor, save."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    model = load(convert(folder), dtype=torch.float32)

    def saved() -> None:
        cast = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
        model.save_pretrained(folder / "copy", state_dict=cast)

    clear(folder)
    return alternated(folder, pairs, "save_pretrained", saved)


def cpu_gather(folder: Path, config: Config, pairs: int) -> list[dict[str, float]]:
    """The state on 8 devices, 4 x 2: each tensor whole on the host with .cpu(), cast, one file."""
    import torch
    from safetensors.torch import save_file

    from tptrain.ckpt.reading import StepSource

    backend = make_backend(plan(config))
    buffers = backend.place(StepSource(folder / STEP / "params"))
    backend.sync()

    def gathered() -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name, buffer in backend.layout.buffers.items():
            whole = buffers[name].cpu()
            for index, row in enumerate(buffer.rows):
                padded = whole[index] if buffer.stacked else whole
                inside = tuple(slice(0, n) for n in row.size)
                tensors[row.name] = padded[inside].to(torch.bfloat16).contiguous()
        (folder / "copy").mkdir()
        save_file(tensors, folder / "copy" / "model.safetensors", metadata={"format": "pt"})

    return alternated(folder, pairs, "cpu_gather", gathered)


def plan(config: Config) -> Any:
    from tptrain.config import (
        DataSection,
        MeshSection,
        ModelSection,
        PrecisionSection,
        Recipe,
        ScheduleSection,
    )
    from tptrain.config.planning import plan_recipe

    recipe = Recipe(
        name="bench",
        topology=f"cpu-{DEVICES}",
        model=ModelSection(config={"model_type": "llama", **config}, tokenizer="train"),
        data=DataSection(path="train.jsonl", seq_len=128, batch_rows=8),
        mesh=MeshSection(fsdp=4, tensor=2),
        schedule=ScheduleSection(max_steps=10),
        precision=PrecisionSection(compute="float32"),
    )
    return plan_recipe(recipe, environ={})


def stages(folder: Path, config: Config) -> dict[str, float]:
    """What each stage takes by itself, one after the other; a conversion runs them side by side."""
    import torch

    from tptrain.export import open_step
    from tptrain.family import stored_rows
    from tptrain.weights import export_bytes
    from tptrain.weights.row_stream import cast_row, for_each_row
    from tptrain.weights.safetensors_header import byte_blocks

    step = open_step(folder / STEP)
    rows, size = stored_rows(step.table), export_bytes(step.table, "bfloat16")
    path, block = folder / "file", os.urandom(2 * 2**20)

    cast = partial(cast_row, read_blocks=step.reader.read_blocks, dtype=torch.bfloat16, setting="dtype")

    def drain(items: Iterable[object]) -> None:
        for _ in items:
            pass

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for at in range(0, size, len(block)):
                file.write(block[: size - at])

    def flush() -> None:
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def read_back() -> None:
        import xxhash

        state = xxhash.xxh3_128()
        for part in byte_blocks(path, 0, size, 4 * 2**20):
            state.update(part.data)

    found = {
        "read_files": timed(lambda: drain(raw_blocks(folder / STEP / "params"))),
        "read_and_digest": timed(lambda: drain(b for row in rows for b in step.reader.read_blocks(row))),
        "read_digest_and_cast": timed(lambda: for_each_row(rows, cast, lambda row, piece: None)),
        "write": timed(write),
        "flush": timed(flush),
        "read_back_and_digest": timed(read_back),
        "all_side_by_side": timed(lambda: convert(folder)),
    }
    clear(folder)
    path.unlink()
    return found


def raw_blocks(folder: Path) -> Iterator[int]:
    """Read every file below a folder into one buffer; gives the bytes of each read."""
    buffer = bytearray(4 * 2**20)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    yield count


def alternated(folder: Path, pairs: int, name: str, yardstick: Callable[[], None]) -> list[dict[str, float]]:
    """Seconds of the conversion and of a yardstick that writes the folder `copy`, round by round."""
    rounds = []
    for _ in range(pairs + 1):
        rounds.append({"convert": timed(lambda: convert(folder)), name: timed(yardstick)})
        clear(folder)
    return rounds[1:]


def clear(folder: Path) -> None:
    for name in ("out", "copy"):
        shutil.rmtree(folder / name, ignore_errors=True)


def timed(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4]))))
