"""A plan for people (`plan_page`) and for programs (`plan_json`)."""

from __future__ import annotations

import dataclasses
from typing import Any

from tptrain.config.mixing import source_sections
from tptrain.config.plan import Plan
from tptrain.config.schema import SourceSection
from tptrain.config.settings import settings, shown, value_of
from tptrain.config.state_parts import PARAMS
from tptrain.config.trainable import FROZEN_DTYPE
from tptrain.estimate import Estimate, estimate
from tptrain.estimate.text import bytes_text
from tptrain.family import LayerRun, ParamRow, adapted_modules, stored_rows
from tptrain.mesh import Spec
from tptrain.report.estimate_page import estimate_blocks, estimate_json
from tptrain.report.param_lines import ParamLine, param_lines, row_device_bytes

# Runs of layers that are listed one by one.
_MOST_RUNS = 6

_EXPERTS = {
    "grouped": "grouped products, those of the tokens that chose them",
    "plain": "plain, products with all tokens",
}


def num_parameters(plan: Plan) -> int:
    """Numbers of the model, trained or frozen, padding not counted."""
    return sum(row.num_elements for row in stored_rows(plan.table))


def num_trained(plan: Plan) -> int:
    """Those of them that are trained."""
    return sum(row.num_elements for row in stored_rows(plan.table) if row.trainable)


def state_device_bytes(plan: Plan) -> dict[str, int]:
    """Bytes of each part of the training state on one device, from the specs; `params` are the weights."""
    sizes = plan.mesh.axis_sizes
    return {
        name: sum(row_device_bytes(row, part.specs[row.name], sizes) for row in part.rows)
        for name, part in plan.parts.items()
    }


def plan_page(plan: Plan, found: Estimate | None = None) -> str:
    """The plan as plain text: derived numbers in sentences, notices, estimates, and the parameter table.

    found: the plan's estimate, where the caller has made it.
    """
    found = found or estimate(plan)
    sentences = [*run_sentences(plan), *size_sentences(plan)]
    blocks = ["\n".join([f"Plan of {plan.recipe.name}", *(f"  {line}" for line in sentences)])]
    if notices := [*plan.notices, *found.notices]:
        blocks.append("\n".join(["Notices", *(f"  - {notice}" for notice in notices)]))
    blocks += estimate_blocks(plan, found)
    blocks.append("\n".join(_table_lines(plan)))
    return "\n\n".join(blocks) + "\n"


def run_sentences(plan: Plan) -> list[str]:
    recipe, topology = plan.recipe, plan.topology
    slices = f", {topology.num_slices} slices" if topology.num_slices > 1 else ""
    rows, tokens = recipe.data.batch_rows, recipe.data.batch_rows * recipe.data.seq_len
    split = f", {recipe.optim.accumulation} micro-batches" if recipe.optim.accumulation > 1 else ""
    per_device = plan.device_rows
    model, weights = recipe.model, "random initialisation"
    if model.pretrained is not None:
        weights = f"weights from {model.pretrained}"
    return [
        f"Devices: {plan.num_devices} ({topology.name}{slices}), mesh {plan.mesh.describe()}, rules"
        f" {plan.rules.name}, backend {recipe.backend}.",
        f"Model: {plan.facts.family}, {num_parameters(plan):,} parameters in {plan.facts.num_hidden_layers}"
        f" layers, {weights}, tokenizer {model.tokenizer}.",
        *_data_sentences(plan),
        f"Step: {rows} rows x {recipe.data.seq_len} = {tokens:,} tokens{split}; {per_device}"
        f" {'row' if per_device == 1 else 'rows'} at a time on each device.",
        f"Attention: {_attention(plan)}.",
        *([f"Experts: {_EXPERTS[plan.experts]}."] if plan.experts else []),
        _loss_sentence(plan),
        *_compiler_sentence(plan),
        f"Schedule: {_length(plan)}, peak learning rate {shown(recipe.optim.learning_rate)},"
        f" {recipe.schedule.warmup_steps} warm-up steps, then {recipe.schedule.kind}.",
        *_evaluation_sentence(plan),
        *_guards_sentence(plan),
        f"Output: {plan.output_dir}; export: {plan.export_dir or 'none'}.",
    ]


def _data_sentences(plan: Plan) -> list[str]:
    """Where the records come from: a sentence for each source, and one for how they are mixed."""
    data = plan.recipe.data
    if not data.sources:
        return [f"Data: {data.path} ({data.preset}), seed {data.seed}."]
    how = {
        "concat": "every row of each once an epoch",
        "weights": "rows by weight",
        "temperature": f"rows by tokens^(1 / {data.mix_temperature:g})",
    }
    found = [f"{name} from {each.path} ({each.preset})" for name, each in source_sections(data).items()]
    return [f"Data: {', '.join(found)}; {how[data.mix]}, seed {data.seed}."]


def _loss_sentence(plan: Plan) -> str:
    chunk, seq_len = plan.loss_chunk_tokens, plan.recipe.data.seq_len
    logits = bytes_text(chunk * plan.logits_token_bytes)
    if chunk == seq_len:
        return f"Loss: all {seq_len} tokens of a row at once, {logits} of float32 logits on each device."
    return (
        f"Loss: {chunk} tokens of a row at a time, in {seq_len // chunk} chunks,"
        f" {logits} of float32 logits on each device."
    )


def _evaluation_sentence(plan: Plan) -> list[str]:
    """What is scored on which records and when, and what follows from it; nothing to say without scores."""
    recipe, metric = plan.recipe, plan.best_metric
    evaluation, data = recipe.eval, recipe.data
    if not plan.metrics:
        return []
    measured = []
    if evaluation.problems:
        measured.append(f"exact match of {evaluation.problems} problems")
    if evaluation.loss_path is not None:
        measured.append(f"loss over {evaluation.loss_path}")
    elif data.validation:
        measured.append(f"loss over {100 * data.validation:g} % of the records, set apart by content")
    every = f", and every {evaluation.every_steps} steps" if evaluation.every_steps else ""
    patience = f"; ends early after {evaluation.patience} without a better one" if evaluation.patience else ""
    return [
        f"Evaluation: {' and '.join(measured)}, before and after training{every}; best by {metric}{patience}."
    ]


def _guards_sentence(plan: Plan) -> list[str]:
    """The guards that a recipe has beside those of every run."""
    guards, sentences = plan.recipe.guards, list[str]()
    if guards.non_finite == "skip":
        sentences.append("a step that is not finite is skipped")
    if guards.spike_factor:
        what = "is skipped" if guards.spike == "skip" else "stops the run"
        sentences.append(
            f"a gradient norm above {guards.spike_factor:g} times the median of {guards.window} {what}"
        )
    return [f"Guards: {', '.join(sentences)}."] if sentences else []


def _compiler_sentence(plan: Plan) -> list[str]:
    if plan.topology.chip.platform != "tpu":
        return []
    flags = " ".join(f"--{name}={value}" for name, value in plan.tpu_flags.items())
    return [f"Compiler: {flags or 'no flags'}."]


def _length(plan: Plan) -> str:
    schedule = plan.recipe.schedule
    if schedule.max_steps is not None:
        return f"{schedule.max_steps:,} steps"
    return f"{shown(schedule.epochs)} epochs (steps are counted when the records are read)"


def _attention(plan: Plan) -> str:
    return f"splash kernel, {plan.splash.describe()}" if plan.splash else "plain, every score in memory"


def size_sentences(plan: Plan) -> list[str]:
    vocab, padded = plan.facts.vocab_size, plan.padded_vocab
    padding = f"padded to {padded:,} in memory" if padded > vocab else "no padding needed"
    parts, hbm = state_device_bytes(plan), plan.topology.chip.hbm_bytes
    state = sum(parts.values())
    share = f", {100 * state / hbm:.1f} % of its {bytes_text(hbm)}" if hbm else ""
    by_part = ", ".join(f"{name} {bytes_text(held)}" for name, held in parts.items())
    recipe = plan.recipe
    return [
        f"Vocabulary: {vocab:,}, {padding}.",
        f"Trained: {_trained(plan)} by {recipe.optim.name}.",
        *_adapters_sentence(plan),
        *_runs_sentence(plan),
        f"State per device: {bytes_text(state)}{share} ({by_part}; without activations and gradients);"
        f" compute in {recipe.precision.compute}, remat {recipe.remat.policy}.",
    ]


def _trained(plan: Plan) -> str:
    """What is trained in which format, and what is frozen."""
    total, trained = num_parameters(plan), num_trained(plan)
    if trained == total:
        return f"all parameters in {plan.recipe.precision.master}"
    frozen = total - trained
    return (
        f"{trained:,} parameters in {plan.recipe.precision.master} ({100 * trained / total:.3g} %;"
        f" {frozen:,} are frozen in {FROZEN_DTYPE})"
    )


def _adapters_sentence(plan: Plan) -> list[str]:
    """Which projections have adapters, and in how many layers; nothing to say without."""
    lora, found = plan.recipe.lora, dict[str, int]()
    for module in adapted_modules(plan.table):
        leaf = module.rpartition(".")[2]
        found[leaf] = found.get(leaf, 0) + 1
    if not found:
        return []
    listed = ", ".join(f"{leaf} ({count} layers)" for leaf, count in found.items())
    return [
        f"Adapters: LoRA of rank {lora.rank}, alpha {shown(lora.alpha)}, on {listed}; a checkpoint holds them"
        " alone."
    ]


def _runs_sentence(plan: Plan) -> list[str]:
    """How layers are looped over and where the backward pass ends; nothing to say where all are alike."""
    cut = plan.layer_runs
    if plan.recipe.backend != "xla" or cut.traced == 1:
        return []
    listed = ", ".join(_layers_text(run) for run in cut.runs[:_MOST_RUNS])
    more = f" and {len(cut.runs) - _MOST_RUNS} more" if len(cut.runs) > _MOST_RUNS else ""
    back = f"; below layer {cut.first_back} nothing is kept and nothing goes back" if cut.first_back else ""
    loops = "one loop" if len(cut.runs) == 1 else f"{len(cut.runs)} loops"
    return [f"Layers: {loops}, {listed}{more}{back}."]


def _layers_text(run: LayerRun) -> str:
    first, last = run.layers[0], run.layers[-1]
    text = f"{first}..{last}" if last > first else f"{first}"
    return f"{text} with a period of {run.period}" if run.period > 1 else text


def spec_text(spec: Spec) -> str:
    """A spec as JAX writes it: P('tensor', 'fsdp'), P(None)."""
    entries = []
    for axes in spec:
        if len(axes) > 1:
            entries.append(f"({', '.join(repr(axis) for axis in axes)})")
        else:
            entries.append(repr(axes[0]) if axes else "None")
    return f"P({', '.join(entries)})"


def _size_text(line: ParamLine) -> str:
    size = " x ".join(str(n) for n in line.row.size)
    padded = " x ".join(str(n) for n in line.row.padded_size)
    return size if size == padded else f"{size} (in memory {padded})"


def _table_lines(plan: Plan) -> list[str]:
    """The parameter table, columns as wide as their widest entry."""
    lines = param_lines(plan.table, plan.specs, plan.mesh.axis_sizes)
    head = ("parameter", "size", "spec", "elements", "weights per device")
    body = [_line_cells(line) for line in lines]
    held = state_device_bytes(plan)[PARAMS]
    total = ("total", "", "", f"{num_parameters(plan):,}", bytes_text(held))
    widths = [max(len(cells[i]) for cells in [head, *body, total]) for i in range(len(head))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    tied = [f"{row.name} is tied to {row.tied_to}." for row in plan.table if row.tied_to]
    body_text = [_padded(cells, widths) for cells in body]
    return [_padded(head, widths), rule, *body_text, rule, _padded(total, widths), *tied]


def _line_cells(line: ParamLine) -> tuple[str, ...]:
    size, spec = _size_text(line), spec_text(line.spec)
    name = line.name if line.row.trainable else f"{line.name} (frozen)"
    return (name, size, spec, f"{line.num_elements:,}", bytes_text(line.device_bytes))


def _padded(cells: tuple[str, ...], widths: list[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:3], widths[:3], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]
    return "  ".join([*left, *right]).rstrip()


def plan_json(plan: Plan, found: Estimate | None = None) -> dict[str, Any]:
    """The plan as JSON data: every setting, every derived number, the estimates, every row of the table.

    found: the plan's estimate, where the caller has made it.
    """
    found = found or estimate(plan)
    sizes, parts = plan.mesh.axis_sizes, state_device_bytes(plan)
    data = {
        "recipe": {path: value_of(plan.recipe, setting) for path, setting in settings().items()},
        "topology": plan.topology.name,
        "num_devices": plan.num_devices,
        "mesh": {"ici": plan.mesh.ici, "dcn": plan.mesh.dcn, "sizes": sizes},
        "rules": plan.rules.name,
        "facts": dataclasses.asdict(plan.facts),
        "hf_config": dict(plan.hf_config),
        "attention": "splash" if plan.splash else "plain",
        "experts": plan.experts,
        "splash_blocks": dataclasses.asdict(plan.splash) if plan.splash else None,
        "tpu_flags": plan.tpu_flags if plan.topology.chip.platform == "tpu" else {},
        "micro_rows": plan.micro_rows,
        "loss_chunk_tokens": plan.loss_chunk_tokens,
        "rows_per_device": plan.device_rows,
        "tokens_per_step": plan.recipe.data.batch_rows * plan.recipe.data.seq_len,
        "padded_vocab": plan.padded_vocab,
        "num_parameters": num_parameters(plan),
        "num_trained": num_trained(plan),
        "master_bytes_per_device": parts[PARAMS],
        "state_bytes_per_device": sum(parts.values()),
        "state_parts_bytes_per_device": parts,
        "output_dir": plan.output_dir,
        "export_dir": plan.export_dir,
        "notices": [*plan.notices, *found.notices],
        "estimate": estimate_json(plan, found),
        "table": [_row_json(plan, row) for row in plan.table],
    }
    return {name: _plain(value) for name, value in data.items()}


def _plain(value: Any) -> Any:
    """The value with lists in place of tuples, as it would come back from a JSON file."""
    if isinstance(value, SourceSection):
        return value.given()
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _row_json(plan: Plan, row: ParamRow) -> dict[str, Any]:
    spec = plan.specs[row.name]
    bytes_held = 0 if row.tied_to else row_device_bytes(row, spec, plan.mesh.axis_sizes)
    return {**dataclasses.asdict(row), "spec": spec, "bytes_per_device": bytes_held}
