"""What a user asks for: the recipe and its sections.

Every setting has a default and one line of meaning (the string under it, shown by `--help`). A recipe may
hold -1 and "auto"; `resolve` turns it into a Plan in which every number is fixed. Importing this module
imports no framework.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class ModelSection:
    """The model and where its weights and tokenizer come from."""

    pretrained: str | None = None
    """Folder or hub id of a Hugging Face checkpoint, or a checkpoint step of a run (weights only); none:
    random initialisation."""
    config: dict[str, Any] | str = "pretrained"
    """Architecture: the fields of a config.json (model.config.FIELD=value sets one of them), the path of one,
    or "pretrained" for the checkpoint's own."""
    tokenizer: str = "pretrained"
    """Folder or hub id of a tokenizer; "pretrained" for the checkpoint's own, "train" for a byte-level BPE
    made from the training records."""
    add_tokens: tuple[str, ...] | None = None
    """Special tokens that the tokenizer gets where it lacks them. If the model has too few rows for their
    ids, its vocabulary grows; new rows begin as the mean of the checkpoint's."""
    chat_template: str = "own"
    """own: the tokenizer's; chatml: ChatML, with its tokens <|im_start|> and <|im_end|>; turns: "User: " and
    "Assistant: ", with no new tokens; or the path of a .jinja file. It is exported with the tokenizer."""
    trainable: tuple[str, ...] = ("*",)
    """Patterns of the names of the weights that are trained, such as model.layers.*.self_attn.* or
    model.layers.3?.*; the others are frozen: held, saved and computed from in bfloat16, without gradients and
    moments. Layers below the lowest that is trained keep nothing and have no backward pass."""


_Preset = Literal["prompt_completion", "gsm8k", "alpaca", "chat", "sharegpt"]


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class SourceSection:
    """One of several sources of records; what it leaves at none is as in data."""

    path: str | None = None
    """Where its records are; none: data.path."""
    subset: str | None = None
    """Configuration name of a hub data set; none: data.subset."""
    split: str | None = None
    """Split of a hub data set or of a saved DatasetDict; none: data.split."""
    preset: _Preset | None = None
    """How its records become tokens; none: data.preset."""
    prompt_column: str | None = None
    """Column of the prompt, auto for the preset's own; none: data.prompt_column."""
    completion_column: str | None = None
    """Column of the completion, auto for the preset's own; none: data.completion_column."""
    tools_column: str | None = None
    """Column of the tools, auto for tools; none: data.tools_column."""
    as_chat: bool | None = None
    """Write prompt and completion by the chat template; none: data.as_chat."""
    system_prompt: str | None = None
    """What the system says first in conversations without a turn of its own; none: data.system_prompt."""
    max_records: int | None = Field(default=None, ge=1)
    """Use only its first so many records; none: data.max_records."""
    weight: float | None = Field(default=None, gt=0)
    """Its share of the rows, over the sum of all weights; with data.mix=weights every source has one."""

    def given(self) -> dict[str, Any]:
        """The settings that are not left as in data."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class DataSection:
    """Training records and how they become rows of tokens."""

    path: str = "openai/gsm8k"
    """JSONL or parquet file, folder saved by `datasets`, hub id, or "builtin:word_problems"."""
    subset: str | None = None
    """Configuration name of a hub data set, such as "main"."""
    split: str = "train"
    """Split of a hub data set or of a saved DatasetDict."""
    preset: _Preset = "prompt_completion"
    """How a record becomes tokens; gsm8k: "Question: ...\\nAnswer:" and " ...", from question and answer;
    alpaca: from instruction, input (may be empty) and output; chat: messages (a list of role and content)
    through the tokenizer's chat template; sharegpt: the same from conversations (a list of from and
    value)."""
    prompt_column: str = "auto"
    """Column of the prompt; auto: the preset's own (prompt, question, instruction, messages,
    conversations)."""
    completion_column: str = "auto"
    """Column of the completion; auto: the preset's own (completion, answer, output; conversations have
    none)."""
    tools_column: str = "auto"
    """Column of the tools that a conversation's assistant may call (a list of JSON schemas, or the same as
    text), which records may lack; auto: tools."""
    as_chat: bool = False
    """Write prompt and completion as a question and its answer by the tokenizer's chat template, in the place
    of the preset's own form."""
    system_prompt: str | None = None
    """What the system says first in conversations that have no turn of its own."""
    loss_on: Literal["assistant", "last_turn", "completion", "all"] = "assistant"
    """What the loss counts. assistant: every turn of the assistant and the token that ends it; last_turn:
    only its last one; completion: the same as assistant, where records are a prompt and a completion; all:
    every token but the first."""
    seq_len: int = Field(default=512, ge=2)
    """Tokens per row; shorter rows are padded."""
    packing: Literal["none", "best_fit"] = "none"
    """none: a record has a row of its own; best_fit: records share rows, in which none sees another, so that
    little is padded."""
    check_packing: bool = True
    """Before training on shared rows, see on the devices that a record's loss does not change with its
    neighbour's tokens; it takes the program of the held-out loss."""
    batch_rows: int = Field(default=16, ge=1)
    """Rows per optimizer step over all devices, before accumulation splits them."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What happens to a record of more than seq_len tokens; both are counted and printed."""
    max_unlabelled: float = Field(default=0.1, ge=0, le=1)
    """Largest share of records without anything that the loss counts (an empty completion, no answer, or none
    within seq_len); they are dropped, and above it nothing is trained."""
    max_records: int | None = Field(default=None, ge=1)
    """Use only the first so many records; none: all."""
    validation: float = Field(default=0.0, ge=0, lt=1)
    """Share of the records that is set apart from training, for the held-out loss; a record's own content
    decides, so that it is always on the same side. 0: none."""
    cache: str = "auto"
    """Folder that keeps tokenised records, from which they are then read as they are needed, so that they may
    be larger than the memory. auto: tptrain/data in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache),
    for files above 64 MB; none: in memory only."""
    seed: int = Field(default=0, ge=0)
    """Seed of the shuffle."""
    sources: dict[str, SourceSection] = Field(default_factory=dict)
    """Several sources by name, each given as data.sources.NAME.path=FILE and the like, in the place of the
    one that data itself names; none: that one."""
    mix: Literal["concat", "weights", "temperature"] = "concat"
    """How several sources are mixed. concat: an epoch is every row of each once, shuffled together; weights:
    each has the share of the rows that its weight says; temperature: weights are tokens^(1 /
    data.mix_temperature). By weights, a source begins anew, in a new order, as often as it ends, and
    schedule.max_steps says how long a run is."""
    mix_temperature: float = Field(default=1.0, ge=1)
    """1: a source weighs as many tokens as it has; the higher, the more alike all of them weigh."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class MeshSection:
    """Sizes of the mesh axes, in JAX's terms; at most one ICI and one DCN size may be -1 (fill)."""

    data: int = 1
    """Data-parallel replicas within a slice."""
    fsdp: int = -1
    """Devices that split every parameter and the batch, within a slice."""
    expert: int = 1
    """Devices that split the experts of a mixture; everything else they split like fsdp."""
    context: int = 1
    """Devices that split the tokens of a row (1: not yet supported)."""
    tensor: int = 1
    """Devices that split heads, MLP and vocabulary, within a slice."""
    dcn_data: int = -1
    """Data-parallel replicas over slices."""
    dcn_fsdp: int = 1
    """Slices that split every parameter."""
    rules: str = "fsdp+tensor"
    """Rule table from dims to axes: "fsdp" or "fsdp+tensor"."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class LoraSection:
    """Adapters in place of the model's weights as what is trained (LoRA, arXiv:2106.09685)."""

    rank: int = Field(default=0, ge=0)
    """Rank of the adapters: a projection x W^T becomes x W^T + alpha / rank * (x A^T) B^T, with A [rank, in]
    and B [out, rank]. These alone are trained and saved; the model's own weights are frozen in bfloat16. 0:
    no adapters."""
    alpha: float = Field(default=16.0, gt=0)
    """Weight of the adapters, over their rank."""
    targets: tuple[str, ...] = ("heads", "kv_heads", "mlp")
    """Projections that get an adapter: dims of the parameter table (heads: q_proj and o_proj; kv_heads:
    k_proj and v_proj; mlp: gate_proj, up_proj and down_proj), names of modules as in PEFT (q_proj), or
    patterns of whole names (model.layers.3?.self_attn.*). Experts of a mixture get none."""

    @property
    def scale(self) -> float:
        """Factor of what an adapter adds; there are adapters."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class OptimSection:
    """The optimizer, with decoupled weight decay on matrices (not on norms and biases)."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """adamw: two moments for every weight; adafactor (arXiv:1804.04235): no first moments, and of the second
    moments of a matrix only the means of its rows and columns, where memory is short."""
    learning_rate: float = Field(default=2e-5, ge=0)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment (adamw)."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment (adamw)."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment (adamw)."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """Format of the moments between steps. A step computes in float32 and updates the weights by the new
    moments as they are; bfloat16: they are then stored rounded to nearest, 8 bits of precision. Adafactor's
    second moments stay in float32. With precision.master=float64, float32 stands for float64."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the mean of the updates (adafactor); 0: none is kept."""
    beta2_decay: float = Field(default=0.8, gt=0, le=1)
    """The second moment of step t decays by 1 - t^-beta2_decay (adafactor)."""
    update_clip: float = Field(default=1.0, gt=0)
    """Largest root mean square of a weight's update before the learning rate (adafactor)."""
    scale_parameter: bool = False
    """Multiply the learning rate by the root mean square of each weight, at least 1e-3 (adafactor)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, multiplied by the learning rate."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0: no clipping."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches per step; each has batch_rows / accumulation rows."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class ScheduleSection:
    """Length of the run and the learning rate over it; exactly one of epochs and max_steps."""

    epochs: float | None = Field(default=None, gt=0)
    """Passes over the records; the last step is filled up with empty rows."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; records repeat, in a new order, as often as needed."""
    kind: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly to its peak."""
    final_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, as a part of the peak (linear and cosine)."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class PrecisionSection:
    """Number formats."""

    compute: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Format of activations and of weights inside the step (float64: backend=torch only)."""
    master: Literal["float32", "float64"] = "float32"
    """Format of the stored weights and optimizer state (float64: backend=torch only)."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class RematSection:
    """What the backward pass computes again instead of keeping."""

    policy: Literal["none", "dots", "attention", "full", "offload_attention", "offload"] = "none"
    """full: keep each layer's input only; attention: what attention gave as well; dots: the results of
    matrix products, but for scores and the output projection of attention; none: everything. offload and
    offload_attention: as full and attention, but what is kept waits in the memory of the TPUs' host.
    backend=torch: none and full only."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class KernelsSection:
    """Kernels in the place of plain PyTorch operations."""

    attention: Literal["auto", "splash", "plain"] = "auto"
    """splash: JAX's Pallas kernel, on TPUs with backend=xla; plain: one operation after the other, with every
    score in memory; auto: splash where it runs and takes the shapes."""
    experts: Literal["auto", "grouped", "plain"] = "auto"
    """grouped: of each expert of a mixture the products with its own tokens, by JAX's Pallas kernels, on TPUs
    with backend=xla; plain: with all tokens; auto: grouped where it runs."""
    splash_block_q: int = -1
    """Queries in a tile of the splash kernel, a multiple of 128 that divides data.seq_len; -1: the largest up
    to 512."""
    splash_block_kv: int = -1
    """Keys in a tile of the splash kernel; as for splash_block_q."""
    splash_block_kv_compute: int = -1
    """Keys of a tile that are worked on at a time, a multiple of 128 that divides splash_block_kv; -1: the
    largest up to 512."""
    splash_fused_backward: bool = False
    """One backward kernel with 5 matrix products a tile instead of two with 7; it needs
    data.seq_len / splash_block_kv times the memory of the queries."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class LossSection:
    """How the loss is computed; its value does not depend on it."""

    chunk_tokens: int = Field(default=0, ge=0)
    """Tokens of every row whose logits are computed at a time; it divides data.seq_len. 0: as many as take
    about 2 GiB in float32 on a device; the plan names them."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class CompilerSection:
    """How XLA compiles for TPUs."""

    tpu_flags: str = "auto"
    """Flags of the TPU compiler as libtpu takes them, "--xla_tpu_x=true --xla_y=4"; a run and a dry run pass
    them alike. auto: those that suit the chip, which the plan names; "auto --xla_y=4": others
    beside them; default: none."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class SaveSection:
    """Checkpoints. One is always written at the end of a run."""

    every_steps: int = Field(default=500, ge=0)
    """Steps between checkpoints; 0: none by steps."""
    every_seconds: float = Field(default=0.0, ge=0)
    """Seconds between checkpoints, beside every_steps: whichever comes first saves; 0: none by time."""
    keep_last: int = Field(default=2, ge=1)
    """How many of the newest checkpoints to keep."""
    keep_every: int = Field(default=0, ge=0)
    """Keep every checkpoint of a step that is a multiple of this as well; 0: none for that."""
    keep_best: int = Field(default=0, ge=0)
    """Keep so many checkpoints with the best save.best_metric as well; 0: none for that. It needs an
    evaluation and eval.every_steps."""
    best_metric: Literal["auto", "exact_match", "held_out_loss", "token_accuracy"] = "auto"
    """What makes a checkpoint the best one, for save.keep_best, eval.patience, export.step and convert_ckpt:
    the lowest held_out_loss or the highest of another. auto: exact_match where problems are answered, else
    held_out_loss."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class ExportSection:
    """The Hugging Face folder written at the end of a run."""

    enabled: bool = True
    """Write it."""
    path: str = "auto"
    """Where; auto: `export` inside the run's folder."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Format of the exported weights."""
    lora: Literal["merged", "adapter"] = "merged"
    """Of a run with adapters. merged: the whole model, each projection with what its adapter adds; adapter: a
    PEFT folder of the adapters alone, which is loaded beside model.pretrained."""
    max_shard_gb: float = Field(default=5.0, gt=0)
    """Largest safetensors file, in GB (1e9 bytes)."""
    step: Literal["last", "best"] = "last"
    """Which checkpoint is exported: the last one, or the best one by save.best_metric, which save.keep_best
    has to keep."""
    require: tuple[str, ...] | None = None
    """What the scores of the exported step must be, or nothing is exported and the exit code is 2: such as
    exact_match>=0.3, or held_out_loss<=before for the score before training; none: anything."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class EvalSection:
    """Scores on held-out records before, during and after training: exact match of greedy answers, and loss
    and token accuracy."""

    every_steps: int = Field(default=0, ge=0)
    """Steps between evaluations; 0: only before and after training."""
    patience: int = Field(default=0, ge=0)
    """Evaluations in a row without a better save.best_metric than the best so far, the one before training
    included, after which the run ends early; 0: it never does."""
    loss_path: str | None = None
    """Held-out records for loss and token accuracy, in the same form as data.path; none: those that
    data.validation sets apart, if any."""
    loss_records: int | None = Field(default=None, ge=1)
    """Use only the first so many records of eval.loss_path; none: all."""
    problems: int = Field(default=0, ge=0)
    """How many held-out problems to answer; 0: none."""
    path: str | None = None
    """Held-out problems, in the same form as data.path; "builtin:word_problems" holds out its own; none:
    those of data.path when it is a builtin, else those that data.validation sets apart."""
    subset: str | None = None
    """Configuration name of a hub data set, of eval.path and eval.loss_path alike."""
    split: str = "test"
    """Split of a hub data set or of a saved DatasetDict, of eval.path and eval.loss_path alike."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer."""
    batch_rows: int = Field(default=64, ge=1)
    """Problems answered at a time."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class GuardsSection:
    """What happens to a step whose numbers are wrong. A step that is skipped uses up its records and leaves
    weights and optimizer as they were."""

    non_finite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient norm is not finite stops the run, or is skipped."""
    spike_factor: float = Field(default=0.0, ge=0)
    """A step is a spike when its gradient norm, before clipping, is above so many times the median of the
    last guards.window norms; 0: none is."""
    spike: Literal["skip", "stop"] = "skip"
    """A spike is skipped, or stops the run."""
    window: int = Field(default=50, ge=3)
    """Finite gradient norms, of skipped steps too, whose median a step is compared with; until so many are
    there, no step is a spike. That of the step just before is not yet among them."""
    max_in_a_row: int = Field(default=5, ge=1)
    """The run stops when more steps than this are skipped one after the other."""
    max_skipped: int = Field(default=100, ge=1)
    """The run stops when more steps than this are skipped in all."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class LogSection:
    """What a run shows and writes; the journal (journal.jsonl) is always written."""

    progress: bool = True
    """Progress bar on the terminal."""
    tensorboard: bool = True
    """TensorBoard event files in the run's folder."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Recipe:
    """One fine-tuning run, as asked for."""

    name: str
    """Name of the recipe, and of the run's folder unless output_dir says otherwise."""
    topology: str = "auto"
    """Accelerators: v5p-32, v5e:4x4, 2xv5p-32, cpu-8 (virtual devices), or auto for what is attached."""
    backend: Literal["xla", "torch"] = "xla"
    """xla: torch_xla over the mesh; torch: plain PyTorch on one CPU device, the oracle."""
    output_dir: str = "auto"
    """The run's folder; auto: runs/<name>."""
    resume: str = "never"
    """never: start anew; auto: go on from the newest good checkpoint if there is one; or the number of
    a step, newer ones being set aside."""
    unverified: bool = False
    """Also go on from a checkpoint that has no digest manifest; a manifest that does not match is never
    accepted."""
    seed: int = Field(default=0, ge=0)
    """Seed of random initialisation."""
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    mesh: MeshSection = Field(default_factory=MeshSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    optim: OptimSection = Field(default_factory=OptimSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    precision: PrecisionSection = Field(default_factory=PrecisionSection)
    remat: RematSection = Field(default_factory=RematSection)
    loss: LossSection = Field(default_factory=LossSection)
    compiler: CompilerSection = Field(default_factory=CompilerSection)
    kernels: KernelsSection = Field(default_factory=KernelsSection)
    save: SaveSection = Field(default_factory=SaveSection)
    export: ExportSection = Field(default_factory=ExportSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    guards: GuardsSection = Field(default_factory=GuardsSection)
    log: LogSection = Field(default_factory=LogSection)

    @property
    def run_folder(self) -> str:
        """The run's folder, with `auto` filled in."""
        return os.path.join("runs", self.name) if self.output_dir == "auto" else self.output_dir
