"""Settings that do nothing in a run, beside what else its recipe says."""

from __future__ import annotations

import math

from tptrain.config.metrics import measured_metrics
from tptrain.config.recipe_checks import CONVERSATIONS
from tptrain.config.schema import Recipe
from tptrain.config.settings import SOURCES, settings, shown, source_settings, value_of
from tptrain.topology import Topology

_FILE_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")

# (whether it holds, what holds, the settings that do nothing then)
_Idle = list[tuple[bool, str, tuple[str, ...]]]


def idle_notices(recipe: Recipe, topology: Topology) -> list[str]:
    """A sentence for every setting that was changed from its default and does nothing in this run.

    Notices and not problems: one override (`export.enabled=false`, a local data.path) must not oblige a user
    to take back what the recipe says beside it.
    """
    notices: dict[str, str] = {}
    found = [*_beside_training(recipe), *_of_data(recipe), *_of_training(recipe, topology)]
    for holds, what, idle in found:
        for setting in (settings()[path] for path in idle if holds):
            value = value_of(recipe, setting)
            if value != setting.default:
                sentence = f"{setting.path}={shown(value)} has no effect with {what}."
                notices.setdefault(setting.path, sentence)
    if recipe.data.mix != "weights":
        for name, source in recipe.data.sources.items():
            if source.weight is not None:
                setting = source_settings(name)[f"{SOURCES}.{name}.weight"]
                given = f"{setting.path}={shown(source.weight)}"
                notices[setting.path] = f"{given} has no effect with data.mix={recipe.data.mix}."
    if recipe.optim.learning_rate == 0:
        notices["optim.learning_rate"] = "optim.learning_rate=0 leaves every parameter as it is."
    return list(notices.values())


def _beside_training(recipe: Recipe) -> _Idle:
    """Of the export, the evaluation and the guards."""
    export, evaluation, guards = recipe.export, recipe.eval, recipe.guards
    problem_settings = ("eval.path", "eval.max_new_tokens", "eval.batch_rows")
    is_scored = bool(measured_metrics(recipe))
    from_files = [path for path in (evaluation.path, evaluation.loss_path) if path is not None]
    skips, spikes, median_of = guards.non_finite == "skip", guards.spike_factor > 0, guards.window
    max_steps = recipe.schedule.max_steps or math.inf
    export_settings = (
        *("export.path", "export.dtype", "export.lora", "export.max_shard_gb"),
        *("export.step", "export.require"),
    )
    return [
        (not export.enabled, "export.enabled=false", export_settings),
        (evaluation.problems == 0, "eval.problems=0", problem_settings),
        (not is_scored, "eval.problems=0 and no held-out loss", ("eval.every_steps", "eval.split")),
        (evaluation.loss_path is None, "eval.loss_path=none", ("eval.loss_records",)),
        (
            bool(from_files) and all(map(_is_one_file, from_files)),
            f"held-out records from {' and '.join(from_files)}",
            ("eval.subset", "eval.split"),
        ),
        (not spikes, "guards.spike_factor=0", ("guards.spike", "guards.window")),
        (
            spikes and max_steps <= median_of + 1,
            f"guards.window={median_of} and schedule.max_steps={recipe.schedule.max_steps}",
            ("guards.spike_factor",),
        ),
        (
            not skips and (not spikes or guards.spike == "stop"),
            "guards that skip nothing",
            ("guards.max_in_a_row", "guards.max_skipped"),
        ),
    ]


def _of_data(recipe: Recipe) -> _Idle:
    data = recipe.data
    return [
        (
            _is_one_file(data.path) and not data.sources,
            f"data.path={data.path}",
            ("data.subset", "data.split"),
        ),
        (
            bool(data.sources) and all(source.path is not None for source in data.sources.values()),
            f"a path for each of {SOURCES}",
            ("data.path",),
        ),
        (
            data.preset in CONVERSATIONS and not data.sources,
            f"data.preset={data.preset}",
            ("data.completion_column", "data.as_chat"),
        ),
        (
            data.preset not in CONVERSATIONS and not data.sources,
            f"data.preset={data.preset}",
            ("data.tools_column",),
        ),
        (
            data.preset not in CONVERSATIONS and not data.as_chat and not data.sources,
            "records that no chat template writes",
            ("data.system_prompt",),
        ),
        (data.packing == "none", "data.packing=none", ("data.check_packing",)),
        (data.mix != "temperature", f"data.mix={data.mix}", ("data.mix_temperature",)),
    ]


def _of_training(recipe: Recipe, topology: Topology) -> _Idle:
    """Of the schedule, the optimizer, the checkpoints, the adapters and where it all runs."""
    model, export, optim, lora = recipe.model, recipe.export, recipe.optim, recipe.lora
    save, max_steps = recipe.save, recipe.schedule.max_steps or math.inf
    only_by_steps = save.every_seconds == 0
    constant = recipe.schedule.kind == "constant"
    of_adafactor = ("optim.momentum", "optim.beta2_decay", "optim.update_clip", "optim.scale_parameter")
    return [
        (constant, "schedule.kind=constant", ("schedule.final_ratio",)),
        (optim.name == "adamw", "optim.name=adamw", of_adafactor),
        (optim.name == "adafactor", "optim.name=adafactor", ("optim.beta1", "optim.beta2", "optim.eps")),
        (
            optim.name == "adafactor" and not optim.momentum,
            "optim.name=adafactor and optim.momentum=0",
            ("optim.moments_dtype",),
        ),
        (
            only_by_steps and save.every_steps == 0,
            "save.every_steps=0",
            ("save.keep_last", "save.keep_every"),
        ),
        (
            only_by_steps and math.lcm(save.every_steps, save.keep_every) > max_steps,
            f"save.every_steps={save.every_steps} and schedule.max_steps={recipe.schedule.max_steps}",
            ("save.keep_every",),
        ),
        (recipe.backend == "torch", "backend=torch", ("compiler.tpu_flags",)),
        (topology.chip.platform != "tpu", f"topology={topology.name}", ("compiler.tpu_flags",)),
        (recipe.resume == "never", "resume=never", ("unverified",)),
        (
            model.pretrained is not None and not lora.rank,
            f"model.pretrained={model.pretrained}",
            ("seed",),
        ),
        (not lora.rank, "lora.rank=0", ("lora.alpha", "lora.targets", "export.lora")),
        (lora.rank > 0 and export.lora == "adapter", "export.lora=adapter", ("export.max_shard_gb",)),
    ]


def _is_one_file(path: str | None) -> bool:
    return path is not None and (path.startswith("builtin:") or path.endswith(_FILE_SUFFIXES))
