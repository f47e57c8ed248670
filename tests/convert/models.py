"""Runs and model folders to convert, written without training, and what is compared about them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils import logging

from tests.small import DictSource
from tests.weights.small_llama import saved_model, small_config, small_tokenizer
from tools import convert_ckpt
from tptrain.ckpt.digests import read_manifest, write_manifest
from tptrain.ckpt.importing import write_step
from tptrain.family import ParamRow, facts_from_config, parameter_table, stored_rows
from tptrain.weights import collect_assets

Tensors = dict[str, torch.Tensor]

STEPS = (10, 20)


def run_tool(*words: object) -> int:
    """The tool's main, as from a command line."""
    return convert_ckpt.main([str(word) for word in words])


def random_tensors(table: tuple[ParamRow, ...], seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {row.name: torch.randn(row.size, generator=generator) * 0.2 for row in stored_rows(table)}


@dataclass(frozen=True)
class Run:
    """The folder of a run. weights: step -> its weights."""

    folder: Path
    table: tuple[ParamRow, ...]
    weights: Mapping[int, Tensors]

    def step(self, number: int) -> Path:
        return self.folder / "checkpoints" / str(number)

    def copy(self, folder: Path) -> Run:
        shutil.copytree(self.folder, folder)
        return replace(self, folder=folder)

    def score(self, **metrics: float) -> None:
        """Give steps a held-out score: `step10=0.5`."""
        for name, value in metrics.items():
            step = self.step(int(name.removeprefix("step")))
            write_manifest(step, replace(read_manifest(step), metrics={"exact_match": value}))


def write_run(
    folder: Path, tied: bool = False, steps: tuple[int, ...] = STEPS, dtype: str = "float32"
) -> Run:
    """Steps of random weights and moments with the assets of a run."""
    config = json.loads(small_config(tied).to_json_string(use_diff=False))
    table = parameter_table(facts_from_config(config))
    weights = {step: random_tensors(table, step) for step in steps}
    (folder / "checkpoints").mkdir(parents=True)
    for step, tensors in weights.items():
        moments = {
            name: DictSource(random_tensors(table, 7 * step + i)) for i, name in enumerate(("mu", "nu"))
        }
        run = {
            "step": step,
            "cursor": 8 * step,
            "seeds": {"init": 3, "data": 5},
            "recipe": {"name": "small", "seed": 3},
            "mesh": {"fsdp": 4, "tensor": 2},
            "hf_config": config,
            "versions": {"tptrain": "0.0.1"},
        }
        path = folder / "checkpoints" / str(step)
        write_step(path, table, DictSource(tensors), run, dtype, moments=moments)
    collect_assets(folder / "assets", config, small_tokenizer(), None, None)
    return Run(folder, table, weights)


def write_model(
    folder: Path, dtype: str = "float32", tied: bool = False, tokenizer: bool = True, **options: Any
) -> Path:
    """A model folder as transformers saves it; options as of `saved_model`."""
    logging.disable_progress_bar()
    saved_model(folder, tied, dtype=dtype, **options)
    if tokenizer:
        small_tokenizer().save_pretrained(folder)
    return folder


def tensors_in(folder: Path) -> Tensors:
    """All tensors of a model folder, as copies."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor.clone() for path in files for name, tensor in load_file(path).items()}


def assert_same_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), other[name].contiguous().view(torch.uint8)), name


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
