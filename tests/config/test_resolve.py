"""From recipe to plan: meshes, padding, paths, notices, what the configs at hand say."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from samples import SMALL_LLAMA, small_recipe

from tptrain.config import ModelSection, Plan, Recipe
from tptrain.config.local import local_topology
from tptrain.config.overrides import apply_overrides
from tptrain.config.resolve import resolve
from tptrain.errors import ProblemsError
from tptrain.mesh.rules import split_count
from tptrain.topology import parse_topology


def _plan(
    *overrides: str, config: dict[str, Any] | None = None, recipe: Recipe | None = None, file: Any = None
) -> Plan:
    asked = apply_overrides(recipe or small_recipe(), overrides)
    return resolve(asked, parse_topology(asked.topology), config, file)


def _refused(*overrides: str, **given: Any) -> dict[str, Any]:
    with pytest.raises(ProblemsError) as caught:
        _plan(*overrides, **given)
    found = {problem.setting: problem for problem in caught.value.problems}
    assert len(found) == len(caught.value.problems), caught.value
    return found


def test_a_plan_has_every_number() -> None:
    plan = _plan("mesh.tensor=2", "optim.accumulation=3")
    assert plan.mesh.axis_sizes == {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}
    assert (plan.num_devices, plan.micro_rows, plan.batch_shards) == (8, 16, 4)
    assert plan.specs["model.layers.2.mlp.down_proj.weight"] == (("fsdp",), ("tensor",))
    assert plan.specs["model.norm.weight"] == ((),)
    assert plan.hf_config == SMALL_LLAMA
    assert plan.notices == ()


def test_several_slices() -> None:
    plan = _plan(
        "topology=2xv5e-16", "mesh.tensor=2", "data.batch_rows=64", "mesh.dcn_data=1", "mesh.dcn_fsdp=2"
    )
    assert (plan.mesh.ici, plan.mesh.dcn) == ((1, 8, 1, 1, 2), (1, 2, 1, 1, 1))
    assert plan.num_devices == 32
    filled = _plan("topology=2xv5e-16", "mesh.tensor=2", "data.batch_rows=64")
    assert filled.mesh.dcn == (2, 1, 1, 1, 1)


def test_fsdp_over_slices_counts_when_it_must_divide() -> None:
    """hidden 96 takes fsdp=32 in one slice, but not 32 over each of 2 slices."""
    wide = ("topology=2xv5e-32", "data.batch_rows=128", "mesh.dcn_data=1", "mesh.dcn_fsdp=2")
    problem = _refused(*wide)["mesh.fsdp"]
    assert (problem.rule, problem.other) == ("must divide hidden_size", "hidden_size=96")
    assert problem.fix == "1, 2, 4, 8 or 16 with mesh.data=-1"
    assert _plan(*wide, "mesh.fsdp=16", "mesh.data=-1").mesh.axis_sizes["fsdp"] == 32


@pytest.mark.parametrize(("tensor", "padded"), [(1, 1031), (2, 1032), (4, 1032)])
def test_vocab_is_padded_to_its_axes(tensor: int, padded: int) -> None:
    plan = _plan(f"mesh.tensor={tensor}")
    assert plan.padded_vocab == padded
    for row in plan.table:
        expected = tuple(padded if d == "vocab" else n for d, n in zip(row.dims, row.size, strict=True))
        assert row.padded_size == expected
        assert ("vocab" in row.dims) == (1031 in row.size)


def test_vocab_is_whole_where_the_rules_keep_it_whole() -> None:
    assert _plan("mesh.rules=fsdp").padded_vocab == 1031


def test_master_format_is_the_storage_format() -> None:
    wide = _plan("backend=torch", "topology=cpu-1", "precision.compute=float64", "precision.master=float64")
    assert {row.storage_dtype for row in wide.table} == {"float64"}
    assert {row.storage_dtype for row in _plan().table} == {"float32"}


@pytest.mark.parametrize(
    ("devices", "data", "tensor"),
    list(itertools.product((1, 4, 6, 8, 12), (1, 2, 3), (1, 2, 3, 4, 8))),
)
def test_a_mesh_either_divides_or_its_advice_does(devices: int, data: int, tensor: int) -> None:
    """No plan has an indivisible dim; where a mesh is refused for one, each size it advises divides."""
    head_rules = ("must divide num_attention_heads", "must divide num_key_value_heads")
    args = (f"topology=cpu-{devices}", f"mesh.data={data}", f"mesh.tensor={tensor}")
    try:
        plan = _plan(*args)
    except ProblemsError as error:
        advice = [p.fix for p in error.problems if p.setting == "mesh.tensor" and p.rule in head_rules]
        for fix in advice:
            for size in fix.replace(" or ", ", ").split(", "):
                assert 8 % int(size) == 4 % int(size) == 176 % int(size) == 0
        return
    for row in plan.table:
        for length, axes in zip(row.padded_size, plan.specs[row.name], strict=True):
            assert length % split_count(axes, plan.mesh.axis_sizes) == 0
    assert 4 % plan.mesh.axis_sizes["tensor"] == 0


def test_advice_fits_the_axes_that_are_fixed() -> None:
    """Of the sizes that divide the heads, only those are named that the other axes leave room for."""
    with pytest.raises(ProblemsError) as caught:
        _plan("mesh.data=2", "mesh.fsdp=1", "mesh.tensor=8")
    assert [p.fix for p in caught.value.problems if p.rule == "must divide num_key_value_heads"] == ["4"]
    assert _plan("mesh.data=2", "mesh.fsdp=1", "mesh.tensor=4").num_devices == 8


def test_all_problems_at_once() -> None:
    found = _refused(
        *("mesh.tensor=8", "data.seq_len=900", "schedule.epochs=1", "resume=sometimes", "mesh.context=2"),
        *("topology=cpu-16", "model.tokenizer=pretrained", "optim.accumulation=7"),
        "precision.compute=float64",
    )
    assert set(found) == {
        *("mesh.tensor", "data.seq_len", "schedule.epochs, schedule.max_steps", "resume", "mesh.context"),
        *("model.tokenizer", "data.batch_rows", "precision.compute"),
    }


def test_problems_of_topology_and_config_do_not_hide_the_others(tmp_path: Any) -> None:
    from tptrain.config.planning import plan_recipe

    recipe = apply_overrides(
        small_recipe(), ["topology=v9-1", f"model.config={tmp_path}/none.json", "resume=maybe"]
    )
    with pytest.raises(ProblemsError) as caught:
        plan_recipe(recipe, {})
    assert [p.setting for p in caught.value.problems] == ["topology", "model.config", "resume"]


@pytest.mark.parametrize(
    ("overrides", "output", "export"),
    [
        ((), "runs/small", "runs/small/export"),
        (("output_dir=here",), "here", "here/export"),
        (("export.path=model",), "runs/small", "model"),
        (("export.enabled=false",), "runs/small", None),
    ],
)
def test_output_paths(overrides: tuple[str, ...], output: str, export: str | None) -> None:
    plan = _plan(*overrides)
    assert (plan.output_dir, plan.export_dir) == (output, export)


@pytest.mark.parametrize(
    ("override", "beside", "notice"),
    [
        ("schedule.final_ratio=0.1", "schedule.kind=constant", "no effect with schedule.kind=constant"),
        ("export.dtype=float32", "export.enabled=false", "no effect with export.enabled=false"),
        ("eval.path=test.jsonl", "eval.problems=0", "no effect with eval.problems=0"),
        ("data.subset=main", "data.path=train.jsonl", "no effect with data.path=train.jsonl"),
        ("data.split=test", "data.path=builtin:word_problems", "no effect with data.path=builtin"),
        ("save.keep_last=5", "save.every_steps=0", "no effect with save.every_steps=0"),
        ("save.keep_every=7", "save.every_steps=10", "no effect with save.every_steps=10 and schedule.max_s"),
        ("eval.every_steps=7", "eval.problems=0", "no effect with eval.problems=0"),
        ("eval.loss_records=7", "eval.loss_path=none", "no effect with eval.loss_path=none"),
        ("export.require=exact_match>=1", "export.enabled=false", "no effect with export.enabled=false"),
        ("guards.window=9", "guards.spike_factor=0", "no effect with guards.spike_factor=0"),
        ("guards.max_skipped=9", "guards.non_finite=stop", "no effect with guards that skip nothing"),
        ("unverified=true", "resume=never", "no effect with resume=never"),
        ("optim.momentum=0.9", "optim.name=adamw", "no effect with optim.name=adamw"),
        ("optim.scale_parameter=true", "optim.name=adamw", "no effect with optim.name=adamw"),
        ("optim.beta2=0.99", "optim.name=adafactor", "no effect with optim.name=adafactor"),
        ("lora.alpha=32", "lora.rank=0", "no effect with lora.rank=0"),
        ("lora.targets=mlp", "lora.rank=0", "no effect with lora.rank=0"),
        ("export.lora=adapter", "lora.rank=0", "no effect with lora.rank=0"),
        (
            *("optim.moments_dtype=bfloat16", "optim.name=adafactor"),
            "no effect with optim.name=adafactor and optim.momentum=0",
        ),
    ],
)
def test_settings_without_effect_are_stated(override: str, beside: str, notice: str) -> None:
    (stated,) = _plan(override, beside).notices
    assert stated.startswith(f"{override} has {notice}")
    if beside != "eval.problems=0":
        assert not _plan(beside).notices


def test_a_window_that_the_run_never_fills_is_stated() -> None:
    """Of 40 steps the last one is compared with the norms of steps up to 38."""
    (stated,) = _plan("guards.spike_factor=5", "guards.window=39").notices
    assert stated.startswith(
        "guards.spike_factor=5 has no effect with guards.window=39 and schedule.max_steps=40"
    )
    assert not _plan("guards.spike_factor=5", "guards.window=38").notices


def test_saves_by_time_keep_what_they_are_told_to() -> None:
    by_time = ("save.every_steps=0", "save.every_seconds=60")
    assert not _plan(*by_time, "save.keep_last=5", "save.keep_every=7").notices
    assert not _plan("save.every_steps=10", "save.keep_every=20").notices


def test_a_learning_rate_of_zero_is_stated() -> None:
    assert "leaves every parameter" in _plan("optim.learning_rate=0").notices[0]


_PRETRAINED = ("model.pretrained=org/some-model", "model.tokenizer=pretrained")


def test_checkpoint_not_at_hand_is_stated() -> None:
    (notice,) = _plan(*_PRETRAINED).notices
    assert "org/some-model is not on this machine" in notice


def test_pretrained_takes_everything_from_the_checkpoint() -> None:
    config = {**SMALL_LLAMA, "vocab_size": 515, "bos_token_id": 3, "something_new": 1}
    plan = _plan(*_PRETRAINED, "model.config=pretrained", config=config)
    assert plan.facts.vocab_size == 515
    assert plan.hf_config == config


def test_agreeing_configs_are_merged_in_either_spelling_of_rope() -> None:
    theirs = {name: value for name, value in SMALL_LLAMA.items() if name != "rope_theta"}
    theirs |= {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}, "eos_token_id": 2}
    plan = _plan(*_PRETRAINED, config=theirs)
    assert plan.hf_config == {**theirs, "rope_theta": 20000.0}
    (notice,) = _plan(*_PRETRAINED, "model.config.eos_token_id=5", config=theirs).notices
    assert notice == "model.config.eos_token_id=5 replaces the checkpoint's 2."


_DIFFERENT = {
    "vocab_size": 1033,
    "hidden_size": 192,
    "intermediate_size": 352,
    "num_hidden_layers": 5,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 30000.0,
    "max_position_embeddings": 600,
    "tie_word_embeddings": True,
    "initializer_range": 0.03,
    "attention_bias": True,
    "mlp_bias": True,
}


@pytest.mark.parametrize("field", _DIFFERENT)
def test_each_fact_is_compared(field: str) -> None:
    theirs = {**SMALL_LLAMA, field: _DIFFERENT[field]}
    found = _refused(*_PRETRAINED, config=theirs)
    problem = found[f"model.config.{field}"]
    assert "must equal the checkpoint's" in problem.rule
    assert f"org/some-model has {field}=" in problem.other
    assert problem.fix.endswith("or model.config=pretrained to take all of them")
    # The head size follows from the hidden size and the number of heads.
    assert set(found) - {"model.config.head_dim"} == {f"model.config.{field}"}
    mended = f"model.config.{field}={problem.fix.split(',')[0]}"
    taken = _plan(*_PRETRAINED, "model.config=pretrained", config=theirs)
    assert _plan(*_PRETRAINED, mended, config=theirs).facts == taken.facts


def test_rope_scaling_is_compared_by_field() -> None:
    scaling = {"rope_type": "linear", "factor": 4.0}
    theirs = {**SMALL_LLAMA, "rope_scaling": scaling}
    found = _refused(*_PRETRAINED, config=theirs)
    assert set(found) == {"model.config.rope_parameters.rope_type", "model.config.rope_parameters.factor"}
    found = _refused(*_PRETRAINED, 'model.config.rope_scaling={"type": "linear", "factor": 2}', config=theirs)
    (problem,) = found.values()
    assert (problem.value, problem.other) == ("2", "org/some-model has rope_parameters.factor=4")


def test_a_field_left_to_its_default_says_so() -> None:
    short = {name: value for name, value in SMALL_LLAMA.items() if name != "max_position_embeddings"}
    recipe = small_recipe(model=ModelSection(config=short, pretrained="org/some-model"))
    (problem,) = _refused(recipe=recipe, config=SMALL_LLAMA).values()
    assert (problem.setting, problem.value) == ("model.config.max_position_embeddings", "2048 (not given)")


def test_config_from_a_file() -> None:
    plan = _plan("model.config=some/config.json", file={**SMALL_LLAMA, "num_hidden_layers": 2, "odd": 1})
    assert plan.facts.num_hidden_layers == 2


def test_resolve_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With files and the environment out of reach, a plan is the same."""
    before = _plan("mesh.tensor=2")

    def no_access(*args: object, **kwargs: object) -> None:
        raise AssertionError("resolve looked outside its arguments")

    for target in ("builtins.open", "os.stat", "os.getenv", "os.listdir", "pathlib.Path.open"):
        monkeypatch.setattr(target, no_access)
    assert _plan("mesh.tensor=2") == before


@pytest.mark.parametrize(
    ("environ", "backend", "name"),
    [
        ({}, "xla", "cpu-1"),
        ({"CPU_NUM_DEVICES": "8"}, "xla", "cpu-8"),
        ({"CPU_NUM_DEVICES": "8"}, "torch", "cpu-1"),
        ({"TPU_ACCELERATOR_TYPE": "v5p-32"}, "xla", "v5p-32"),
        ({"TPU_ACCELERATOR_TYPE": "v5litepod-16"}, "xla", "v5e-16"),
        ({"TPU_ACCELERATOR_TYPE": "v5p-32"}, "torch", "cpu-1"),
        ({"TPU_ACCELERATOR_TYPE": "v5p-32", "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}, "xla", "cpu-4"),
        ({"TPU_ACCELERATOR_TYPE": "v6e-256", "MEGASCALE_NUM_SLICES": "2"}, "xla", "2xv6e-256"),
    ],
)
def test_local_topology(environ: dict[str, str], backend: str, name: str) -> None:
    assert parse_topology(local_topology(environ, backend)).name == name
