"""`tptrain generate RUN_OR_FOLDER PROMPT`: one answer from a run, a checkpoint step or a model folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tptrain.backends.base import Backend, Tensors
from tptrain.backends.make import make_backend, prepare_process
from tptrain.ckpt.reading import lora_of
from tptrain.ckpt.restoring import restore_part
from tptrain.ckpt.steps import find_step, is_step_folder, read_run
from tptrain.config.overrides import apply_overrides
from tptrain.config.plan import Plan
from tptrain.config.planning import find_topology, plan_recipe
from tptrain.config.schema import (
    DataSection,
    ExportSection,
    ModelSection,
    PrecisionSection,
    Recipe,
    ScheduleSection,
)
from tptrain.config.state_parts import PARAMS
from tptrain.data.pairs import encode_prompt
from tptrain.data.render import Renderer
from tptrain.data.tokenizer import load_tokenizer
from tptrain.errors import refuse
from tptrain.export import open_step
from tptrain.generate.decoding import Generator
from tptrain.weights import SafetensorsSource
from tptrain.weights.hf_json import read_json

USAGE = """\
usage: tptrain generate RUN_OR_FOLDER PROMPT [--raw] [max_new_tokens=256] [setting=value ...]

RUN_OR_FOLDER  a run's folder (its newest checkpoint), a step RUN/checkpoints/STEP, or a model folder
PROMPT         the question; a run or step puts it into the form it was trained on (data.preset), a model
               folder does not know that form and takes the text as it is
--raw          take the text as it is in any case
setting=value  settings of a recipe, such as mesh.tensor=2, precision.compute=bfloat16, backend=torch
"""

_DEFAULT_NEW_TOKENS = 256


def main(argv: Sequence[str]) -> int:
    """Print the answer to one prompt. Returns the exit code."""
    if not argv or argv[0] in ("--help", "-h"):
        print(USAGE, end="")
        return 0
    if len(argv) < 2 or "=" in argv[0]:
        raise refuse(
            "arguments", " ".join(argv), "must be a folder and a prompt", "see --help", "RUN 'prompt'"
        )
    folder, prompt, options = Path(argv[0]).expanduser(), argv[1], [a for a in argv[2:] if a != "--raw"]
    new_tokens = _take_new_tokens(options)
    print(answer(folder, prompt, new_tokens, options, raw="--raw" in argv[2:]))
    return 0


def _take_new_tokens(options: list[str]) -> int | None:
    """Remove `max_new_tokens=N` from the options and return N, or None where it is not given."""
    for option in options:
        key, _, value = option.partition("=")
        if key == "max_new_tokens":
            options.remove(option)
            if not value.isdigit() or int(value) < 1:
                raise refuse(key, value, "must be a whole number above 0", "smallest: 1", "64")
            return int(value)
    return None


def answer(
    folder: Path, prompt: str, new_tokens: int | None, overrides: Sequence[str] = (), raw: bool = False
) -> str:
    """The greedy answer of the model in `folder`.

    new_tokens: longest answer; None for 256, or what the model's positions leave behind the prompt.
    raw: go on from `prompt` as it is; otherwise a run's model gets it in the form of the run's preset.
    """
    source = folder if (folder / "config.json").exists() else find_step(folder, "model")
    plan = _plan(source, overrides)
    prepare_process(plan)
    tokenizer = load_tokenizer(plan.recipe.model)
    backend = make_backend(plan)  # before anything reads the step: JAX takes its devices at its first use
    ids = encode_prompt(tokenizer, prompt)
    if not raw and is_step_folder(source):
        form = _form(read_run(source)["recipe"])
        if form is not None:
            ids = Renderer(tokenizer, form).question_ids(prompt)
    if not ids:
        raise refuse("prompt", repr(prompt), "must have at least one token", "it has 0", "a text")
    if new_tokens is None:
        room = plan.facts.max_position_embeddings - len(ids)
        new_tokens = max(min(_DEFAULT_NEW_TOKENS, room), 1)
    generator = Generator(backend, plan, 1, len(ids), new_tokens, _stop_ids(source, tokenizer))
    (generated,) = generator.generate(_weights(plan, backend, source), [ids])
    return str(tokenizer.decode(generated, skip_special_tokens=True)).strip()


def _form(saved: Mapping[str, Any]) -> DataSection | None:
    """The form of the records that a run was trained on; None for a converted model folder, which has none.

    saved: the settings of its recipe by name.
    """
    names = ("preset", "as_chat", "system_prompt")
    found = {name: saved[f"data.{name}"] for name in names if f"data.{name}" in saved}
    return DataSection(**found) if found else None


def _plan(source: Path, overrides: Sequence[str]) -> Plan:
    """A plan with a row per device; it is only read for the model and the mesh."""
    recipe = apply_overrides(_recipe(source), overrides)
    rows = find_topology(recipe, os.environ).num_devices
    return plan_recipe(replace(recipe, data=replace(recipe.data, batch_rows=rows)))


def _recipe(source: Path) -> Recipe:
    """What generating needs of a recipe; training sections keep their defaults and do nothing."""
    return Recipe(
        name="generate",
        model=ModelSection(pretrained=str(source)),
        data=DataSection(path="none", seq_len=2),
        schedule=ScheduleSection(max_steps=1),
        precision=PrecisionSection(compute="float32"),
        export=ExportSection(enabled=False),
    )


def _weights(plan: Plan, backend: Backend, source: Path) -> Tensors:
    if not is_step_folder(source):
        return backend.place(SafetensorsSource(str(source), plan.table))
    if lora_of(read_run(source)) is not None:
        return backend.place(open_step(source, setting="model").reader)
    return restore_part(plan, backend, source, PARAMS, "model")


def _stop_ids(source: Path, tokenizer: object) -> list[int]:
    """The stop tokens that the folder's generation_config.json names, and the tokenizer's EOS."""
    folder = source.parent.parent / "assets" if is_step_folder(source) else source
    path = folder / "generation_config.json"
    named = read_json(path, "model").get("eos_token_id") if path.exists() else None
    stops = named if isinstance(named, list) else [named]
    return [stop for stop in [*stops, getattr(tokenizer, "eos_token_id", None)] if stop is not None]
