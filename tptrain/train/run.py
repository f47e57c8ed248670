"""One run, from a plan to an exported model: everything is put together here, nothing is computed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerFast

from tptrain.backends.base import Backend, Tensors, TensorSource
from tptrain.backends.make import make_backend, prepare_process
from tptrain.ckpt.checkpointer import Checkpointer, restore_part
from tptrain.ckpt.reading import PARAMS, is_step_folder, read_run
from tptrain.config.checkpoint_config import config_is_on_the_hub_only
from tptrain.config.plan import Plan
from tptrain.config.planning import plan_recipe
from tptrain.config.schema import Recipe
from tptrain.data.batches import Batches, RunLength, run_length
from tptrain.data.dataset import tokenize_records
from tptrain.data.render import record_texts
from tptrain.data.sources import load_records
from tptrain.data.tokenizer import check_tokenizer, load_tokenizer, train_tokenizer
from tptrain.errors import Problem, TptrainError, raise_if_any
from tptrain.eval.exact_match import ExactMatch, Score
from tptrain.export import export_step
from tptrain.report.plan_page import plan_json
from tptrain.train.folder import (
    RunFolder,
    continuation_problems,
    folder_problems,
    length_problems,
    step_to_resume,
)
from tptrain.train.journal import Journal
from tptrain.train.loop import Loop, Progress
from tptrain.train.observers import LogLines, Observer, ProgressBar, TensorBoard
from tptrain.train.state import PARTS, fresh_state, join_parts, not_halted, part_of
from tptrain.train.summary import print_start, print_summary
from tptrain.weights import (
    CONFIG_FILES,
    TOKENIZER_FILES,
    RandomSource,
    SafetensorsSource,
    collect_assets,
    local_folder,
)

_VERSIONED = ("tptrain", "torch", "torch_xla", "jax", "orbax-checkpoint", "transformers")


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: its folder, its newest checkpoint, the export, and the scores around training."""

    output_dir: Path
    checkpoint: Path
    export_dir: Path | None
    before: Score | None
    after: Score | None


@dataclass(frozen=True)
class Prepared:
    """Everything that reading the inputs yields, before a device is touched."""

    tokenizer: PreTrainedTokenizerFast
    batches: Batches
    length: RunLength


def train(plan: Plan, console: Console | None = None) -> RunResult:
    """Run a plan: train, save, export, and score if asked to.

    Raises ProblemsError before anything is written when the inputs or the output folder do not allow the run.
    """
    console = console or Console(highlight=False, markup=False)
    raise_if_any(host_problems(plan))
    prepare_process(plan)
    folder = RunFolder(Path(plan.output_dir).expanduser())
    raise_if_any(folder_problems(plan, folder))
    prepared = prepare(plan, folder, console)
    done_steps = step_to_resume(plan, folder) or 0
    raise_if_any(length_problems(plan, prepared.length.total_steps, done_steps))
    backend = make_backend(plan)
    scorer = ExactMatch(plan, backend, prepared.tokenizer) if plan.recipe.eval.problems else None
    if scorer is not None and scorer.skipped:
        console.print(f"Evaluation: {scorer.skipped} problems left out (no text, or too long to answer).")
    source = _weight_source(plan)
    folder.root.mkdir(parents=True, exist_ok=True)
    _write_assets(plan, folder, prepared.tokenizer)
    checkpointer = Checkpointer(plan, backend, folder.checkpoints)
    try:
        state, start = _start_state(plan, backend, folder, checkpointer, source)
        print_start(console, plan, prepared.length, start)
        before = _scored(console, scorer, state, "before training")
        state = _train(plan, backend, folder, checkpointer, prepared, console, state, start)
        after = _scored(console, scorer, state, "after training")
        checkpointer.wait()
    finally:
        checkpointer.close()
    newest = folder.step(prepared.length.total_steps)
    exported = _export(plan, newest, console)
    result = RunResult(folder.root, newest, exported, before, after)
    print_summary(console, plan, result.output_dir, newest, exported, before, after)
    return result


def train_recipe(recipe: Recipe, console: Console | None = None) -> RunResult:
    """Plan a recipe and run it. A config that only the hub has is fetched first, so that it is compared."""
    pretrained = recipe.model.pretrained
    if pretrained is not None and config_is_on_the_hub_only(recipe):
        local_folder(pretrained, "model.pretrained", CONFIG_FILES)
    return train(plan_recipe(recipe), console)


def host_problems(plan: Plan) -> list[Problem]:
    """Several hosts: each would have to write its own shards, and one of them the files of the run."""
    hosts = plan.topology.num_hosts
    if hosts == 1:
        return []
    rule = "must be a slice of one host: training on several hosts is not yet supported"
    return [Problem("topology", plan.topology.name, rule, f"{hosts} hosts", "v6e-8, v5e-8, v5p-8 or cpu-8")]


def prepare(plan: Plan, folder: RunFolder, console: Console) -> Prepared:
    """Read records and tokenizer; tokenise."""
    recipe = plan.recipe
    data = recipe.data
    records = load_records(data.path, data.subset, data.split, data.max_records)
    tokenizer = _tokenizer(plan, folder, records)
    raise_if_any(check_tokenizer(tokenizer, plan.facts.vocab_size))
    dataset, counts = tokenize_records(records, tokenizer, data)
    console.print(f"Data: {counts}.")
    length = run_length(len(dataset), recipe.schedule, data.batch_rows)
    return Prepared(
        tokenizer, Batches(dataset, data, recipe.optim.accumulation, length.total_samples), length
    )


def _tokenizer(plan: Plan, folder: RunFolder, records: list[dict[str, Any]]) -> PreTrainedTokenizerFast:
    """The recipe's tokenizer; one that is trained by a run is read back when the run goes on."""
    model = plan.recipe.model
    if model.tokenizer != "train":
        return load_tokenizer(model)
    if step_to_resume(plan, folder) is not None:
        return PreTrainedTokenizerFast.from_pretrained(str(folder.assets))
    texts = [record_texts(record, plan.recipe.data) for record in records]
    whole = ["".join(text) for text in texts if not isinstance(text, str)]
    return train_tokenizer(whole, plan.facts.vocab_size)


def _write_assets(plan: Plan, folder: RunFolder, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the run's config and tokenizer; what a run that saved no step has left is replaced."""
    if folder.assets.exists():
        if step_to_resume(plan, folder) is not None:
            return
        shutil.rmtree(folder.assets)
    model = plan.recipe.model
    tokenizer_folder = checkpoint_folder = None
    if model.pretrained is not None:
        checkpoint_folder = _assets_of(model.pretrained, "model.pretrained", CONFIG_FILES)
    if model.tokenizer == "pretrained":
        assert model.pretrained is not None
        tokenizer_folder = _assets_of(model.pretrained, "model.pretrained", TOKENIZER_FILES)
    elif model.tokenizer != "train":
        tokenizer_folder = local_folder(model.tokenizer, "model.tokenizer", TOKENIZER_FILES)
    collect_assets(folder.assets, plan.hf_config, tokenizer, tokenizer_folder, checkpoint_folder)


def _assets_of(source: str, setting: str, patterns: tuple[str, ...]) -> Path:
    """The folder with the config and tokenizer of a checkpoint; a step of a run keeps them in its assets."""
    path = Path(source).expanduser()
    return path.parent.parent / "assets" if is_step_folder(path) else local_folder(source, setting, patterns)


def _weight_source(plan: Plan) -> TensorSource | Path:
    """Where the first weights come from: a step folder, safetensors files, or a random generator."""
    pretrained = plan.recipe.model.pretrained
    if pretrained is None:
        return RandomSource(plan.recipe.seed, plan.facts.initializer_range)
    path = Path(pretrained).expanduser()
    return path if is_step_folder(path) else SafetensorsSource(pretrained, plan.table)


def _start_state(
    plan: Plan, backend: Backend, folder: RunFolder, checkpointer: Checkpointer, source: TensorSource | Path
) -> tuple[Tensors, Progress]:
    step = step_to_resume(plan, folder)
    if step is not None:
        raise_if_any(continuation_problems(plan, read_run(folder.step(step))))
        restored = checkpointer.restore(step, PARTS)
        return join_parts(restored.parts, not_halted(backend)), Progress(step, restored.run["cursor"])
    if not isinstance(source, Path):
        return fresh_state(backend, source), Progress(0, 0)
    params = restore_part(plan, backend, source, PARAMS, "model.pretrained")
    parts = {"params": params, "mu": backend.zeros(), "nu": backend.zeros()}
    return join_parts(parts, not_halted(backend)), Progress(0, 0)


def _train(
    plan: Plan,
    backend: Backend,
    folder: RunFolder,
    checkpointer: Checkpointer,
    prepared: Prepared,
    console: Console,
    state: Tensors,
    start: Progress,
) -> Tensors:
    """Run the loop with its observers around it."""
    total = prepared.length.total_steps
    observers = _observers(plan, folder, console, total, start.step)
    loop = Loop(plan, backend, prepared.batches, total, observers, _saver(plan, checkpointer))
    try:
        return loop.run(state, start)
    finally:
        for observer in observers:
            observer.close()


def _observers(plan: Plan, folder: RunFolder, console: Console, total: int, done: int) -> list[Any]:
    log = plan.recipe.log
    observers: list[Observer] = [Journal(folder.root, keep_steps=done)]
    if log.tensorboard:
        observers.append(TensorBoard(folder.root, done))
    if log.progress:
        bar = ProgressBar(console, total, done) if console.is_terminal else LogLines(console, total)
        observers.append(bar)
    return observers


def _saver(plan: Plan, checkpointer: Checkpointer) -> Callable[[Tensors, Progress], None]:
    shared = {
        "seeds": {"init": plan.recipe.seed, "data": plan.recipe.data.seed},
        "recipe": plan_json(plan)["recipe"],
        "mesh": plan.mesh.axis_sizes,
        "hf_config": dict(plan.hf_config),
        "versions": {name: version(name) for name in _VERSIONED},
    }

    def save(state: Tensors, progress: Progress) -> None:
        run = {**shared, "step": progress.step, "cursor": progress.cursor}
        checkpointer.save(progress.step, {part: part_of(state, part) for part in PARTS}, run)

    return save


def _scored(console: Console, scorer: ExactMatch | None, state: Tensors, when: str) -> Score | None:
    if scorer is None:
        return None
    started = time.perf_counter()
    score = scorer(part_of(state, "params"))
    seconds = time.perf_counter() - started
    console.print(
        f"Held-out problems answered right {when}: {score.right} of {len(score.answers)} ({seconds:.0f} s)."
    )
    return score


def _export(plan: Plan, step_folder: Path, console: Console) -> Path | None:
    if plan.export_dir is None:
        return None
    section = plan.recipe.export
    try:
        return export_step(step_folder, Path(plan.export_dir), None, section.dtype, section.max_shard_gb)
    except TptrainError:
        console.print(
            f"The run is saved; export it with: python tools/convert_ckpt.py {step_folder} FOLDER",
            soft_wrap=True,
        )
        raise
