"""The processes of a run, one per host, as jax.distributed knows them; with one process nothing is done."""

from __future__ import annotations

from collections import Counter

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

BARRIER_SECONDS = 1800
_TEXT_BYTES = 2048

_passed: Counter[str] = Counter()


def join_hosts(coordinator: str, num_processes: int, index: int) -> None:
    """Join the processes of a run; call it once, before anything uses JAX.

    coordinator: "host:port" of the process with index 0, which every process can reach.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes, index)


def process_index() -> int:
    return jax.process_index()


def process_count() -> int:
    return jax.process_count()


def is_primary() -> bool:
    """Whether this process writes what a run has one of."""
    return process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here. Usable in any thread; all processes call it equally often."""
    if process_count() > 1:
        _passed[name] += 1  # a key serves once
        key = f"tptrain/{name}/{_passed[name]}"
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=BARRIER_SECONDS * 1000)


def first_text(text: str) -> str:
    """The text of the first process whose text is not empty; the same in every process.

    Every process calls it, from its main thread. Texts are cut at 2048 bytes.
    """
    if process_count() == 1:
        return text
    padded = np.zeros(_TEXT_BYTES, np.uint8)
    encoded = text.encode("utf-8")[:_TEXT_BYTES]
    padded[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    texts = (bytes(row[row > 0]).decode("utf-8", errors="ignore") for row in gathered)
    return next((found for found in texts if found), "")
