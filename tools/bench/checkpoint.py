"""What saving and restoring costs, beside plain Orbax in JAX, torch DCP and the bare disk.

    python tools/bench/checkpoint.py                      1.5 GB of state on 8 virtual devices, a few minutes
    python tools/bench/checkpoint.py --gb 4 --pairs 5 --folder /mnt/disk

One training state (weights and two moments in float32, a vocabulary that no mesh divides) is saved and
restored by tptrain and by others in turns, A B A B, in one process on the same folder. All is warm: the
first round is left out. The last line is a JSON object of medians over the pairs. "time": ours over theirs,
below 1 is faster. "speed": our GB/s over theirs, above 1 is faster.

save_blocking_over_copy       time that a save holds up training, to `_get_local_shards` of the same tensors
save_blocking_seconds, copy_seconds: the two, in seconds
save_blocking_without_copy_over_sync_save: time of the same without its own copy, to a synchronous Orbax save
save_total_over_orbax_jax     speed until the step is published with its digests, to Orbax with jax.Arrays
restore_over_orbax_jax        speed onto the devices with verification (the default), to Orbax in JAX
restore_unverified_over_orbax_jax: the same without verification
restore_over_raw_read         speed with verification, to reading the same files into one buffer
digest_over_save              time that the digests take alone, to the whole save
peak_extra_host_over_state    memory at its peak from the second save on, over that before the first one, as a
                              multiple of the state
save_blocking_over_torch_dcp_async: time, to torch.distributed.checkpoint.async_save of host tensors
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

_VERSIONED = ("tptrain", "torch", "torch_xla", "jax", "orbax-checkpoint", "tensorstore")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    print(f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    print("versions:", ", ".join(f"{name} {version(name)}" for name in _VERSIONED))
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-checkpoint-") as folder:
        print(json.dumps(measure(Path(folder), args.gb, args.pairs)))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=1.5, help="size of the state in GB (1e9 bytes)")
    parser.add_argument("--pairs", type=int, default=5, help="rounds that count, after one that does not")
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    return parser.parse_args(argv)


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def measure(folder: Path, gb: float, pairs: int) -> dict[str, float]:
    """All rounds, and their medians."""
    from tools.bench.checkpoint_sides import DcpSide, JaxSide, OurSide, raw_read

    ours = OurSide(folder / "ours", gb)
    print(f"state: {ours.num_bytes / 1e9:.3f} GB, {ours.num_arrays} arrays, mesh {ours.mesh}")
    peak = peak_memory(ours)
    theirs, dcp = JaxSide(folder / "orbax", ours), DcpSide(folder / "dcp", ours)
    rounds = []
    for index in range(pairs + 1):
        step = 10 + index
        row: dict[str, float] = {"copy": timed(ours.copy)[0]}
        row["save"] = timed(partial(ours.save, step))[0]
        row["own_copy"] = ours.copy_seconds
        row["save_total"] = row["save"] + timed(ours.wait)[0]
        row["orbax_sync"] = timed(partial(theirs.save_sync, step))[0]
        row["orbax_total"] = timed(partial(theirs.save_async, step))[0]
        row["dcp"] = timed(partial(dcp.save, step))[0]
        dcp.wait()
        row["digest"] = timed(ours.digest)[0]
        row["restore"] = timed(partial(ours.restore, step, verify=True))[0]
        row["orbax_restore"] = timed(partial(theirs.restore, step))[0]
        row["unverified"] = timed(partial(ours.restore, step, verify=False))[0]
        row["raw"] = timed(partial(raw_read, ours.folder / str(step)))[0]
        ours.forget(step)
        theirs.forget(step)
        dcp.forget(step)
        if index:
            rounds.append(row)
            print("  ".join(f"{name} {seconds:.3f}" for name, seconds in row.items()))
    return {**summary(rounds), "peak_extra_host_over_state": round(peak / ours.num_bytes, 3)}


def summary(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    def over(top: Callable[[Mapping[str, float]], float], bottom: str) -> float:
        return round(median(top(row) / row[bottom] for row in rounds), 4)

    def seconds(name: str) -> float:
        return round(median(row[name] for row in rounds), 4)

    return {
        "save_blocking_over_copy": over(lambda row: row["save"], "copy"),
        "save_blocking_seconds": seconds("save"),
        "copy_seconds": seconds("copy"),
        "save_blocking_without_copy_over_sync_save": over(
            lambda row: row["save"] - row["own_copy"], "orbax_sync"
        ),
        "save_total_over_orbax_jax": over(lambda row: row["orbax_total"], "save_total"),
        "restore_over_orbax_jax": over(lambda row: row["orbax_restore"], "restore"),
        "restore_unverified_over_orbax_jax": over(lambda row: row["orbax_restore"], "unverified"),
        "restore_over_raw_read": over(lambda row: row["raw"], "restore"),
        "digest_over_save": over(lambda row: row["digest"], "save_total"),
        "save_blocking_over_torch_dcp_async": over(lambda row: row["save"], "dcp"),
    }


def peak_memory(ours: Any) -> int:
    """Bytes that saving has added at its peak, from the second save on."""
    from tptrain.heap import trim_heap

    trim_heap()  # what placing the state has left in the heap would hide as much of the saves
    before = resident_bytes("VmRSS")
    ours.save(1)
    ours.wait()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    for step in (2, 3):
        ours.save(step)
        ours.wait()
    peak = resident_bytes("VmHWM") - before
    for step in (1, 2, 3):
        ours.forget(step)
    return peak


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    sys.exit(main())
