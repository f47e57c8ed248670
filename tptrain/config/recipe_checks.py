"""Checks of a recipe by itself and beside the model's facts: what contradicts, and what has no effect."""

from __future__ import annotations

import re

from tptrain.config.compiler_flags import compiler_flags
from tptrain.config.evaluation_checks import evaluation_problems
from tptrain.config.mixing import mixing_problems, source_sections
from tptrain.config.schema import Recipe
from tptrain.config.settings import SOURCES, shown
from tptrain.errors import Problem, nearest, unknown_name
from tptrain.family import ModelFacts

BUILTIN_DATA = ("builtin:word_problems",)

# A byte-level BPE starts from the 256 bytes and needs ids for the beginning, the end and padding.
SMALLEST_TRAINED_VOCAB = 259

# A step down by less than 2^-8 of a number may be rounded back to the same bfloat16.
_SLOWEST_BFLOAT16_DECAY = 0.996

_RESUME_WORDS = ("never", "auto")
# The presets whose records are conversations.
CONVERSATIONS = ("chat", "sharegpt")


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
    if data.loss_on != "completion" or data.preset not in CONVERSATIONS:
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
