"""Checks of a recipe by itself and beside the model's facts: what contradicts, and what has no effect."""

from __future__ import annotations

import math
import re

from tptrain.config.compiler_flags import compiler_flags
from tptrain.config.evaluation_checks import evaluation_problems
from tptrain.config.metrics import measured_metrics
from tptrain.config.mixing import mixing_problems, source_sections
from tptrain.config.schema import Recipe
from tptrain.config.settings import SOURCES, settings, shown, source_settings, value_of
from tptrain.errors import Problem, nearest, unknown_name
from tptrain.family import ModelFacts
from tptrain.topology import Topology

BUILTIN_DATA = ("builtin:word_problems",)

# A byte-level BPE starts from the 256 bytes and needs ids for the beginning, the end and padding.
SMALLEST_TRAINED_VOCAB = 259

# A step down by less than 2^-8 of a number may be rounded back to the same bfloat16.
_SLOWEST_BFLOAT16_DECAY = 0.996

_RESUME_WORDS = ("never", "auto")
_CONVERSATIONS = ("chat", "sharegpt")
_FILE_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")


def recipe_problems(recipe: Recipe) -> list[Problem]:
    """Everything wrong that can be told from the recipe alone."""
    return [
        *_name_problems(recipe),
        *_tokenizer_problems(recipe),
        *_data_problems(recipe),
        *_loss_on_problems(recipe),
        *_schedule_problems(recipe),
        *mixing_problems(recipe),
        *_precision_problems(recipe),
        *_remat_problems(recipe),
        *_moments_problems(recipe),
        *evaluation_problems(recipe),
        *_compiler_problems(recipe),
        *_adapter_export_problems(recipe),
    ]


def facts_problems(recipe: Recipe, facts: ModelFacts, num_added: int = 0) -> list[Problem]:
    """Settings that ask for more than the model has. num_added: tokens that a trained tokenizer gets."""
    problems = []
    longest, seq_len = facts.max_position_embeddings, recipe.data.seq_len
    other = f"max_position_embeddings={longest}"
    if seq_len > longest:
        rule, fix = "must not exceed the model's positions", f"{longest} or less"
        problems.append(Problem("data.seq_len", seq_len, rule, other, fix))
    new_tokens = recipe.eval.max_new_tokens
    if recipe.eval.problems and new_tokens >= longest:
        rule, fix = "must leave room for the prompt in the model's positions", f"{longest - 1} or less"
        problems.append(Problem("eval.max_new_tokens", new_tokens, rule, other, fix))
    # The names of the three special tokens are not told apart here: adding one of them asks for a spare id.
    smallest = SMALLEST_TRAINED_VOCAB + num_added
    if recipe.model.tokenizer == "train" and facts.vocab_size < smallest:
        rule = "is too small for a byte-level tokenizer trained on the records"
        other = f"256 bytes and {smallest - 256} special tokens"
        fix = f"{smallest} or more"
        problems.append(Problem("model.config.vocab_size", facts.vocab_size, rule, other, fix))
    return problems


def _name_problems(recipe: Recipe) -> list[Problem]:
    problems = []
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", recipe.name):
        rule = "must be usable as the name of a folder"
        passing = re.sub(r"[^\w.-]+", "_", recipe.name).lstrip("_.-") or "my_run"
        problems.append(Problem("name", recipe.name, rule, "letters, digits, _, . and -", passing))
    if recipe.resume not in _RESUME_WORDS and not recipe.resume.isdecimal():
        fix = nearest(recipe.resume, _RESUME_WORDS) or "auto"
        other = "choices: never, auto, or the number of a step"
        problems.append(Problem("resume", recipe.resume, "must be one of its choices", other, fix))
    return problems


def _tokenizer_problems(recipe: Recipe) -> list[Problem]:
    model = recipe.model
    asked = model.add_tokens or ()
    repeated = next((t for t in asked if not t.strip() or asked.count(t) > 1), None)
    if repeated is not None:
        rule, other = "must name each token once, and none that is blank", f"{repeated!r} among them"
        fix = ",".join(dict.fromkeys(t for t in asked if t.strip())) or "no add_tokens"
        return [Problem("model.add_tokens", ",".join(asked), rule, other, fix)]
    if model.tokenizer == "pretrained" and model.pretrained is None:
        rule = "needs a checkpoint to take the tokenizer from"
        fix = "train, or a tokenizer's folder or hub id"
        return [Problem("model.tokenizer", "pretrained", rule, "model.pretrained=none", fix)]
    if model.tokenizer == "train" and model.pretrained is not None:
        rule = "makes new token ids, which the checkpoint's weights do not know"
        other = f"model.pretrained={model.pretrained}"
        return [Problem("model.tokenizer", "train", rule, other, "pretrained, or model.pretrained=none")]
    return []


def _loss_on_problems(recipe: Recipe) -> list[Problem]:
    """Which of a conversation's turns complete it, the word does not say."""
    data = recipe.data
    if data.loss_on != "completion" or data.preset not in _CONVERSATIONS:
        return []
    rule, fix = "needs records of a prompt and a completion", "assistant (every turn) or last_turn"
    return [Problem("data.loss_on", "completion", rule, f"data.preset={data.preset}", fix)]


def _data_problems(recipe: Recipe) -> list[Problem]:
    named = {
        **{
            f"{SOURCES}.{name}.path" if name else "data.path": section.path
            for name, section in source_sections(recipe.data).items()
        },
        "eval.path": recipe.eval.path,
        "eval.loss_path": recipe.eval.loss_path,
    }
    return [
        unknown_name(setting, path, "builtin data set", BUILTIN_DATA)
        for setting, path in named.items()
        if path is not None and path.startswith("builtin:") and path not in BUILTIN_DATA
    ]


def _schedule_problems(recipe: Recipe) -> list[Problem]:
    schedule = recipe.schedule
    epochs, steps, warmup = schedule.epochs, schedule.max_steps, schedule.warmup_steps
    if (epochs is None) == (steps is None):
        given = f"{shown(epochs)} and {shown(steps)}"
        other = "neither is given" if epochs is None else "both are given"
        fix = "schedule.epochs=1 or schedule.max_steps=1000" if epochs is None else "none for one of the two"
        settings_named = "schedule.epochs, schedule.max_steps"
        return [Problem(settings_named, given, "exactly one of the two must be given", other, fix)]
    if steps is not None and warmup >= steps:
        rule, other = "must be less than the steps of the run", f"schedule.max_steps={steps}"
        fix = f"{steps - 1} or less" if steps > 1 else "0"
        return [Problem("schedule.warmup_steps", warmup, rule, other, fix)] if warmup else []
    return []


def _precision_problems(recipe: Recipe) -> list[Problem]:
    compute, master = recipe.precision.compute, recipe.precision.master
    problems = []
    if recipe.backend == "xla":
        for setting, value in (("precision.compute", compute), ("precision.master", master)):
            if value == "float64":
                rule, fix = "needs the plain PyTorch backend", "float32, or backend=torch topology=cpu-1"
                problems.append(Problem(setting, value, rule, "backend=xla", fix))
    elif master == "float64" and compute != "float64":
        rule, other = "gains nothing over a narrower compute format", f"precision.compute={compute}"
        fix = "float32, or precision.compute=float64"
        problems.append(Problem("precision.master", master, rule, other, fix))
    elif compute == "float64" and master != "float64":
        rule, other = "gains nothing over narrower stored weights", f"precision.master={master}"
        fix = "float32, or precision.master=float64"
        problems.append(Problem("precision.compute", compute, rule, other, fix))
    return problems


def _compiler_problems(recipe: Recipe) -> list[Problem]:
    text = recipe.compiler.tpu_flags
    try:
        compiler_flags(text)
    except ValueError as error:
        rule = "must be flags of the form --name=value, each given once"
        fix = '"--xla_tpu_enable_latency_hiding_scheduler=true", with auto before it or not, auto or default'
        return [Problem("compiler.tpu_flags", text, rule, f"found {error}", fix)]
    return []


def _moments_problems(recipe: Recipe) -> list[Problem]:
    """Decays so slow that a moment in bfloat16 would be rounded back to where it was, and never fall."""
    optim = recipe.optim
    if optim.moments_dtype != "bfloat16":
        return []
    decays = ("beta1", "beta2") if optim.name == "adamw" else ("momentum",)
    rule = f"must be at most {_SLOWEST_BFLOAT16_DECAY} for moments in bfloat16, or they could never fall"
    other, fix = "optim.moments_dtype=bfloat16", f"{_SLOWEST_BFLOAT16_DECAY}, or optim.moments_dtype=float32"
    return [
        Problem(f"optim.{name}", getattr(optim, name), rule, other, fix)
        for name in decays
        if getattr(optim, name) > _SLOWEST_BFLOAT16_DECAY
    ]


def _remat_problems(recipe: Recipe) -> list[Problem]:
    policy = recipe.remat.policy
    if recipe.backend != "torch" or policy in ("none", "full"):
        return []
    rule, fix = "needs the XLA backend", "none or full, or backend=xla"
    return [Problem("remat.policy", policy, rule, "backend=torch", fix)]


def _adapter_export_problems(recipe: Recipe) -> list[Problem]:
    """An adapter is nothing without the model it stands on, and random weights are in no folder."""
    export = recipe.export
    if not (recipe.lora.rank and export.enabled and export.lora == "adapter" and not recipe.model.pretrained):
        return []
    rule = "needs a model folder that the adapter is loaded beside"
    fix = "merged, or model.pretrained=FOLDER"
    return [Problem("export.lora", "adapter", rule, "model.pretrained=none", fix)]


def _is_one_file(path: str | None) -> bool:
    return path is not None and (path.startswith("builtin:") or path.endswith(_FILE_SUFFIXES))


def _idle_settings(recipe: Recipe, topology: Topology) -> list[tuple[bool, str, tuple[str, ...]]]:
    """(whether it holds, what holds, the settings that do nothing then)."""
    model, data, export, evaluation = recipe.model, recipe.data, recipe.export, recipe.eval
    problem_settings = ("eval.path", "eval.max_new_tokens", "eval.batch_rows")
    is_scored = bool(measured_metrics(recipe))
    from_files = [path for path in (evaluation.path, evaluation.loss_path) if path is not None]
    guards, skips = recipe.guards, recipe.guards.non_finite == "skip"
    spikes, median_of = guards.spike_factor > 0, guards.window
    save, max_steps = recipe.save, recipe.schedule.max_steps or math.inf
    only_by_steps = save.every_seconds == 0
    export_settings = (
        *("export.path", "export.dtype", "export.lora", "export.max_shard_gb"),
        *("export.step", "export.require"),
    )
    constant = recipe.schedule.kind == "constant"
    optim, lora = recipe.optim, recipe.lora
    of_adafactor = ("optim.momentum", "optim.beta2_decay", "optim.update_clip", "optim.scale_parameter")
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
            data.preset in _CONVERSATIONS and not data.sources,
            f"data.preset={data.preset}",
            ("data.completion_column", "data.as_chat"),
        ),
        (
            data.preset not in _CONVERSATIONS and not data.sources,
            f"data.preset={data.preset}",
            ("data.tools_column",),
        ),
        (
            data.preset not in _CONVERSATIONS and not data.as_chat and not data.sources,
            "records that no chat template writes",
            ("data.system_prompt",),
        ),
        (data.packing == "none", "data.packing=none", ("data.check_packing",)),
        (data.mix != "temperature", f"data.mix={data.mix}", ("data.mix_temperature",)),
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


def idle_notices(recipe: Recipe, topology: Topology) -> list[str]:
    """A sentence for every setting that was changed from its default and does nothing in this run.

    Notices and not problems: one override (`export.enabled=false`, a local data.path) must not oblige a user
    to take back what the recipe says beside it.
    """
    notices: dict[str, str] = {}
    for holds, what, idle in _idle_settings(recipe, topology):
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
