"""Checks of a finished conversion against its source: every tensor's digest, and logits with transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch.func import functional_call

from tptrain.backends.base import TORCH_DTYPES, Tensors
from tptrain.backends.xla.process import set_environment
from tptrain.convert import VerificationError
from tptrain.convert.from_hf import FolderModel
from tptrain.convert.progress import size_text
from tptrain.errors import Problem
from tptrain.export import StepModel
from tptrain.family import ModelFacts, ParamRow, facts_from_config, stored_rows
from tptrain.models.decoder import Decoder
from tptrain.topology import parse_topology
from tptrain.weights import ReadBlocks
from tptrain.weights.row_stream import cast_row, for_each_row

TOLERANCE = 1e-5
PROMPT_TOKENS = (7, 512)

_BLOCK_BYTES = 4 * 2**20
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class LogitGap:
    """How far two models' logits are apart on one prompt: max|d|, and max|logit| of transformers' model."""

    tokens: int
    difference: float
    largest: float

    @property
    def passes(self) -> bool:
        # Written so that a NaN fails.
        return self.difference <= TOLERANCE * self.largest

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens: max|d| {self.difference:.3g}, max|logit| {self.largest:.3g}, "
            f"ratio {self.difference / self.largest if self.largest else float('nan'):.2g}"
        )


def memory_problems(
    table: Iterable[ParamRow], setting: str = "--verify", free_bytes: int | None = None
) -> list[Problem]:
    """Why the logits could not be compared on this machine: two float32 models do not fit into its memory.

    free_bytes: memory to be had; None to ask the system.
    """
    needed = 2 * 4 * sum(row.num_elements for row in stored_rows(table))
    free = available_bytes() if free_bytes is None else free_bytes
    if needed <= free:
        return []
    rule = f"needs {size_text(needed)} of memory for the logits: the model twice in float32"
    return [Problem(setting, "all", rule, f"available: {size_text(free)}", "--verify=digests")]


def available_bytes() -> int:
    """Memory that new processes may take without swapping, as Linux estimates it."""
    lines = _MEMINFO.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024


def verify_digests(step: StepModel, folder: FolderModel, dtype: str) -> int:
    """Compare every tensor of a step and of a folder, of which one was made from the other in `dtype`.

    Both are read again from first to last byte; the source is cast as the conversion did. Returns the number
    of tensors. Raises VerificationError that names the tensors that differ.
    """
    rows = stored_rows(step.table)
    mine = tensor_digests(rows, step.reader.read_blocks, dtype)
    theirs = tensor_digests(rows, partial(folder.source.read_blocks, max_bytes=_BLOCK_BYTES), dtype)
    different = [name for name, digest in mine.items() if theirs[name] != digest]
    if different:
        listed = ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
        raise VerificationError(
            f"{len(different)} of {len(mine)} tensors differ in {step.folder} and {folder.folder}: {listed}"
        )
    return len(mine)


def tensor_digests(rows: Iterable[ParamRow], read_blocks: ReadBlocks, dtype: str) -> dict[str, str]:
    """Row name -> XXH3-128 of its values in `dtype`, streamed."""
    rows = tuple(rows)
    hashes = {row.name: xxhash.xxh3_128() for row in rows}
    pieces = partial(cast_row, read_blocks=read_blocks, dtype=TORCH_DTYPES[dtype], setting="--dtype")

    def update(row: ParamRow, piece: torch.Tensor) -> None:
        hashes[row.name].update(piece.contiguous().view(torch.uint8).numpy().data)

    for_each_row(rows, pieces, update)
    return {name: state.hexdigest() for name, state in hashes.items()}


def verify_logits(step: StepModel, folder: Path, dtype: str) -> list[LogitGap]:
    """Compare transformers' logits of a model folder with this package's own of a step, both in float32.

    Both models take their weights through `dtype` and run on the CPU. The prompts are fixed ids, one short
    and one long, which is cut to the positions that the model has. Raises VerificationError with the numbers
    if a gap is too wide.
    """
    facts = facts_from_config(step.config)
    prompts = [_prompt(facts, tokens) for tokens in PROMPT_TOKENS]
    theirs = _transformers_logits(folder, dtype, prompts)
    ours = _own_logits(facts, step, dtype, prompts)
    gaps = [
        LogitGap(one.shape[1], (one - other).abs().max().item(), other.abs().max().item())
        for one, other in zip(ours, theirs, strict=True)
    ]
    if not all(gap.passes for gap in gaps):
        shown = "; ".join(map(str, gaps))
        raise VerificationError(
            f"the logits of {step.folder} and {folder} differ by more than {TOLERANCE:g}: {shown}"
        )
    return gaps


def _prompt(facts: ModelFacts, tokens: int) -> torch.Tensor:
    """Fixed ids from the whole vocabulary: [1, T]."""
    count = min(tokens, facts.max_position_embeddings)
    ids = np.random.default_rng(tokens).integers(0, facts.vocab_size, (1, count))
    return torch.from_numpy(ids)


@torch.no_grad()
def _transformers_logits(folder: Path, dtype: str, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    # transformers asks torch_xla for a device where that is installed.
    set_environment(parse_topology("cpu-1"), os.environ)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True).eval()
    for parameter in model.parameters():
        parameter.copy_(parameter.to(TORCH_DTYPES[dtype]))
    return [model(input_ids=prompt).logits for prompt in prompts]


@torch.no_grad()
def _own_logits(
    facts: ModelFacts, step: StepModel, dtype: str, prompts: list[torch.Tensor]
) -> list[torch.Tensor]:
    with torch.device("meta"):
        decoder = Decoder(facts)
    weights: Tensors = {
        row.name: step.reader.read(row).to(TORCH_DTYPES[dtype]).float() for row in stored_rows(step.table)
    }
    tensors: Mapping[str, torch.Tensor] = {**weights, **decoder.constants()}

    def logits(prompt: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(prompt.shape[1])[None]
        return functional_call(decoder, dict(tensors), (prompt, positions, torch.ones_like(prompt)))

    return [logits(prompt) for prompt in prompts]
