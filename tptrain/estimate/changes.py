"""The first change of a recipe with which its step would fit a chip's memory.

Candidates are tried from the one that costs least: compute activations again, take smaller micro-batches,
keep activations in the host's memory, train on fewer rows, split parameters over more chips, take chips with
more memory, train on shorter rows. Each is planned like any recipe, so that what is proposed passes every
other check, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from tptrain.chips import CHIPS
from tptrain.config.overrides import apply_overrides
from tptrain.config.plan import Plan
from tptrain.config.remat import OFFLOADED
from tptrain.config.resolve import resolve
from tptrain.config.settings import settings, shown, value_of
from tptrain.errors import Problem, ProblemsError
from tptrain.estimate.estimate import Estimate
from tptrain.estimate.hosts import host_memory_problems, host_needs
from tptrain.estimate.memory import FITTED, Fitted, memory, verdict
from tptrain.estimate.text import bytes_text
from tptrain.estimate.workload import workload_of
from tptrain.topology import Topology, larger_slices, parse_topology

# Setting -> value as it is written in an override.
Change = dict[str, str]

# Names that the checkpoints of nearly all decoders share.
_ATTENTION_WEIGHTS = "model.layers.*.self_attn.*"


def memory_problems(plan: Plan, found: Estimate, fitted: Fitted = FITTED) -> list[Problem]:
    """The problem of a step that is larger than a chip's memory, with the first change that mends it."""
    if found.verdict != "does not fit":
        return []
    assert found.hbm_bytes is not None
    chip = plan.topology.chip
    parts = {**found.memory.arguments, **found.memory.peak.parts}
    largest = max(parts, key=lambda name: parts[name])
    rule = "needs more memory than a chip has, by the estimate"
    other = (
        f"{bytes_text(found.memory.total_bytes)} of the {bytes_text(found.hbm_bytes)} that a {chip.name} chip"
        f" lets a program use; largest part: {largest}, {bytes_text(parts[largest])}"
    )
    change = first_change_that_fits(plan, fitted)
    named = change or {"topology": ""}
    values = ", ".join(_current(plan, path) for path in named)
    return [Problem(", ".join(named), values, rule, other, proposal(plan, change, fitted))]


def fitted_to_compiled(found: Estimate, needed_bytes: int) -> Fitted:
    """Numbers for estimates beside a program that the compiler found to need `needed_bytes` of a chip.

    Temporaries are scaled by what the compiler counted over what was estimated here.
    """
    counted = max(needed_bytes - found.memory.argument_bytes, 0)
    return replace(FITTED, temporaries=FITTED.temporaries * counted / found.memory.temporary_bytes)


def proposal(plan: Plan, change: Change | None, fitted: Fitted = FITTED) -> str:
    """The change as overrides; where it takes other chips, also what could be trained on these."""
    if change is not None and "topology" not in change:
        return change_text(change)
    fewer = first_change_that_fits(plan, fitted, _fewer_weights(plan))
    texts = [change_text(one) for one in (change, fewer) if one is not None]
    return ", or ".join(texts) or "a smaller model"


def first_change_that_fits(
    plan: Plan, fitted: Fitted = FITTED, candidates: Iterable[Change] | None = None
) -> Change | None:
    """The first candidate whose estimate fits with its margin; None when none does."""
    for change in _candidates(plan) if candidates is None else candidates:
        changed = plan_with(plan, change)
        if changed is not None and _fits(changed, fitted):
            return change
    return None


def change_text(change: Change) -> str:
    """A change as overrides to paste."""
    return " ".join(f"{path}={value}" for path, value in change.items())


def _fits(plan: Plan, fitted: Fitted) -> bool:
    work = workload_of(plan)
    total = memory(work, fitted).total_bytes
    return verdict(total, plan.topology.chip.hbm_bytes) == "fits" and not host_memory_problems(
        plan, host_needs(plan, work)
    )


def plan_with(plan: Plan, change: Change) -> Plan | None:
    """The plan of the recipe with some settings changed; None where it would be refused."""
    recipe = apply_overrides(plan.recipe, [f"{path}={value}" for path, value in change.items()])
    topology = parse_topology(recipe.topology) if "topology" in change else plan.topology
    is_read = recipe.model.config == "pretrained"
    rows = plan.facts.vocab_size
    # As the files have it, so that the vocabulary grows again, and what may not be frozen then is known.
    found = {**plan.hf_config, "vocab_size": rows - plan.new_rows}
    try:
        return resolve(recipe, topology, found if is_read else None, found, num_ids=rows)
    except ProblemsError:
        return None


def _current(plan: Plan, path: str) -> str:
    return plan.topology.name if path == "topology" else shown(value_of(plan.recipe, settings()[path]))


def _candidates(plan: Plan) -> Iterator[Change]:
    """Changes in the order in which they are tried; only settings that change are named."""
    recipe, rows = plan.recipe, plan.recipe.data.batch_rows
    full = _least_kept(plan)
    if full:
        yield full
    for remat in [{}, full] if full else [{}]:
        yield from (change for change in _in_micro_batches(plan, remat) if change != remat)
    for offload in _offloading(plan):
        yield from _in_micro_batches(plan, offload)
    for fewer in _fewer_rows(rows, plan.batch_shards):
        yield {**full, **_accumulation(plan, 1), "data.batch_rows": str(fewer)}
    for lighter in _lighter_optimizer(plan):
        yield from _in_micro_batches(plan, {**full, **lighter})
    if plan.mesh.axis_sizes["data"] > 1:
        yield {**full, "mesh.data": "1", "mesh.fsdp": "-1"}
        if plan.topology.num_slices > 1:
            yield {**full, "mesh.data": "1", "mesh.fsdp": "-1", "mesh.dcn_data": "1", "mesh.dcn_fsdp": "-1"}
    for larger in [*larger_slices(plan.topology), *_slices_with_more_memory(plan.topology)]:
        yield from ({**full, **change} for change in _on_another_slice(plan, larger))
    for tokens in _shorter_rows(recipe.data.seq_len):
        yield {**full, **_accumulation(plan, rows // plan.batch_shards), "data.seq_len": str(tokens)}


def _least_kept(plan: Plan) -> Change:
    """The policy that keeps least, in the same memory as the recipe's; {} where the recipe's does."""
    now = plan.recipe.remat.policy
    least = "offload" if now in OFFLOADED else "full"
    return {} if now == least else {"remat.policy": least}


def _offloading(plan: Plan) -> Iterator[Change]:
    """Activations to the host, where TPUs have one, the XLA backend can, and the recipe does not yet."""
    if plan.recipe.backend == "xla" and plan.topology.chip.platform == "tpu" and not plan.offloaded:
        yield {"remat.policy": "offload"}


def _lighter_optimizer(plan: Plan) -> Iterator[Change]:
    """Moments of half the size, then hardly any."""
    optim = plan.recipe.optim
    if optim.name == "adamw" and optim.moments_dtype == "float32":
        yield {"optim.moments_dtype": "bfloat16"}
    if optim.name == "adamw":
        yield {"optim.name": "adafactor"}


def _fewer_weights(plan: Plan) -> Iterator[Change]:
    """Training the attention of all layers alone, with each optimizer, in as few micro-batches as may be."""
    recipe = plan.recipe
    base = {**_least_kept(plan), "model.trainable": _ATTENTION_WEIGHTS}
    if recipe.model.trainable != (_ATTENTION_WEIGHTS,):
        for optimizer in ({}, *_lighter_optimizer(plan)):
            yield from _in_micro_batches(plan, {**base, **optimizer})


def _in_micro_batches(plan: Plan, change: Change) -> Iterator[Change]:
    """A change as it is, then with ever more micro-batches."""
    recipe = plan.recipe
    yield change
    for count in _accumulations(recipe.data.batch_rows, plan.batch_shards, recipe.optim.accumulation):
        yield {**change, "optim.accumulation": str(count)}


def _slices_with_more_memory(topology: Topology) -> Iterator[Topology]:
    """Slices of other chips, of as many chips or twice as many, whose chips have more memory; least first."""
    here = topology.chip.hbm_bytes or 0
    chips = [chip for chip in CHIPS.values() if (chip.hbm_bytes or 0) > here]
    for chip in sorted(chips, key=lambda chip: chip.hbm_bytes or 0):
        smallest = Topology(chip, (1, 1, 1), topology.num_slices)
        for found in larger_slices(smallest):
            if topology.num_devices <= found.num_devices <= 2 * topology.num_devices:
                yield found


def _on_another_slice(plan: Plan, topology: Topology) -> Iterator[Change]:
    """Parameters over all chips: with the batch as it is, in micro-batches, and with a row for each chip."""
    recipe, rows = plan.recipe, plan.recipe.data.batch_rows
    shards = topology.num_devices // plan.mesh.axis_sizes["tensor"]
    wider = {"topology": topology.name}
    if recipe.mesh.fsdp != -1:
        wider["mesh.fsdp"] = "-1"
    if recipe.mesh.data == -1:
        wider["mesh.data"] = "1"
    yield wider
    yield {**wider, **_accumulation(plan, max(rows // max(shards, 1), 1))}
    if rows < shards:
        yield {**wider, **_accumulation(plan, 1), "data.batch_rows": str(shards)}


def _accumulation(plan: Plan, count: int) -> Change:
    return {} if plan.recipe.optim.accumulation == count else {"optim.accumulation": str(count)}


def _accumulations(rows: int, shards: int, now: int) -> Iterator[int]:
    """More micro-batches than now, each with as many rows for every device."""
    per_shard = rows // shards
    yield from (count for count in range(now + 1, per_shard + 1) if per_shard % count == 0)


def _shorter_rows(tokens: int) -> Iterator[int]:
    while tokens >= 4:
        tokens //= 2
        yield tokens


def _fewer_rows(rows: int, shards: int) -> Iterator[int]:
    """Half as many rows, and half of that, as long as every device has some."""
    per_shard = rows // shards // 2
    while per_shard:
        yield per_shard * shards
        per_shard //= 2
