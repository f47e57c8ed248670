"""Bad inputs that can be told from the overrides, or from the recipe by itself."""

from __future__ import annotations

from bad_input_form import BadInput

# Overrides as such: names, forms, types, bounds.
OVERRIDES = [
    BadInput(
        "completion of a conversation",
        "data.loss_on", "completion", "needs records of a prompt and a completion", "data.preset=chat",
        "last_turn",
        ("data.preset=chat", "data.loss_on=completion"),
        mended=("data.preset=chat", "data.loss_on=last_turn"),
    ),
    BadInput(
        "unknown setting",
        "mesh.tensr", "2", "not a known setting", "settings of mesh: data, fsdp,",
        "mesh.tensor (did you mean",
        ("mesh.tensr=2",), mended=("mesh.tensor=2",),
    ),
    BadInput(
        "unknown section",
        "optimizer.learning_rate", "1", "not a known setting", "sections: model, data,",
        "optim.learning_rate",
        ("optimizer.learning_rate=1",), mended=("optim.learning_rate=1",),
    ),
    BadInput(
        "setting without its section",
        "max_steps", "7", "not a known setting", "and name, topology,", "schedule.max_steps",
        ("max_steps=7",), mended=("schedule.max_steps=7",),
    ),
    BadInput(
        "initials",
        "optim.lr", "1e-3", "not a known setting", "settings of optim: name, learning_rate,",
        "optim.learning_rate",
        ("optim.lr=1e-3",), mended=("optim.learning_rate=1e-3",),
    ),
    BadInput(
        "setting in another section",
        "data.tensor", "2", "not a known setting", "settings of data: path,", "mesh.tensor",
        ("data.tensor=2",), mended=("mesh.tensor=2",),
    ),
    BadInput(
        "name like nothing",
        "zzz.qqq", "2", "not a known setting", "sections: model,", "--help",
        ("zzz.qqq=2",),
    ),
    BadInput(
        "section as setting",
        "mesh", "4x2", "is a section, not a setting", "settings of mesh: data,", "mesh.data=",
        ("mesh=4x2",), mended=("mesh.data=1",),
    ),
    BadInput(
        "no equals sign",
        "argument", "--mesh.tensor", "key=value", "no '='", "mesh.tensor=value",
        ("--mesh.tensor",), mended=("mesh.tensor=2",),
    ),
    BadInput(
        "given twice",
        "mesh.tensor", "4", "given twice", "mesh.tensor=2", "mesh.tensor=4 once",
        ("mesh.tensor=2", "mesh.tensor=4"), mended=("mesh.tensor=4",),
    ),
    BadInput(
        "empty value",
        "data.path", "", "must not be empty", "type: text", "data.path=VALUE",
        ("data.path=",), mended=("data.path=other.jsonl",),
    ),
    BadInput(
        "not a whole number",
        "data.seq_len", "long", "must be a whole number", "type: whole number, at least 2", "256",
        ("data.seq_len=long",), mended=("data.seq_len=256",),
    ),
    BadInput(
        "whole number in float form",
        "schedule.max_steps", "1e3", "must be a whole number", "whole number or none, at least 1", "1000",
        ("schedule.max_steps=1e3",), mended=("schedule.max_steps=1000",),
    ),
    BadInput(
        "below its bound",
        "optim.accumulation", "0", "must be at least 1", "smallest: 1", "1 or more",
        ("optim.accumulation=0",), mended=("optim.accumulation=1",),
    ),
    BadInput(
        "not under its bound",
        "optim.beta2", "1", "must be below 1", "must stay under: 1", "0.95",
        ("optim.beta2=1",), mended=("optim.beta2=0.95",),
    ),
    BadInput(
        "above its bound",
        "schedule.final_ratio", "1.5", "must be at most 1", "largest: 1", "1 or less",
        ("schedule.final_ratio=1.5",), mended=("schedule.final_ratio=1",),
    ),
    BadInput(
        "not finite",
        "optim.learning_rate", "nan", "must be a finite number", "type: number", "2e-05",
        ("optim.learning_rate=nan",), mended=("optim.learning_rate=2e-05",),
    ),
    BadInput(
        "not a choice",
        "remat.policy", "ful", "must be one of its choices",
        "choices: none, dots, attention, full, offload_attention, offload", "full",
        ("remat.policy=ful",), mended=("remat.policy=full",),
    ),
    BadInput(
        "chunks that do not divide the row",
        "loss.chunk_tokens", "48", "must divide the tokens of a row", "data.seq_len=256", "32 or 64",
        ("loss.chunk_tokens=48",), mended=("loss.chunk_tokens=32",),
    ),
    BadInput(
        "a chunk longer than the row",
        "loss.chunk_tokens", "512", "must divide the tokens of a row", "data.seq_len=256", "256",
        ("loss.chunk_tokens=512",), mended=("loss.chunk_tokens=256",),
    ),
    BadInput(
        "not true or false",
        "export.enabled", "maybe", "must be true or false", "type: true or false", "true",
        ("export.enabled=maybe",), mended=("export.enabled=true",),
    ),
    BadInput(
        "model field without fields",
        "model.config.vocab_size", "9", "needs an architecture given by its fields",
        "model.config=pretrained",
        "model.config=PATH",
        ("model.config=pretrained", "model.config.vocab_size=9"),
    ),
    BadInput(
        "field of a field that is not there",
        "model.config.rope_scaling.factor", "8", "needs model.config.rope_scaling to have fields",
        "model.config.rope_scaling=null", "as JSON",
        ("model.config.rope_scaling.factor=8",),
        mended=('model.config.rope_scaling={"rope_type": "linear", "factor": 8}',),
    ),
]  # fmt: skip

# The recipe by itself.
RECIPES = [
    BadInput(
        "neither epochs nor max_steps",
        "schedule.epochs, schedule.max_steps", "none and none", "exactly one of the two", "neither is given",
        "schedule.epochs=1 or",
        ("schedule.max_steps=none",), mended=("schedule.max_steps=none", "schedule.epochs=1"),
    ),
    BadInput(
        "both epochs and max_steps",
        "schedule.epochs, schedule.max_steps", "2.5 and 40", "exactly one of the two", "both are given",
        "none",
        ("schedule.epochs=2.5",), mended=("schedule.epochs=2.5", "schedule.max_steps=none"),
    ),
    BadInput(
        "warm-up longer than the run",
        "schedule.warmup_steps", 40, "must be less than the steps", "schedule.max_steps=40", "39 or less",
        ("schedule.warmup_steps=40",), mended=("schedule.warmup_steps=39",),
    ),
    BadInput(
        "remat policy that plain PyTorch does not have",
        "remat.policy", "dots", "needs the XLA backend", "backend=torch", "none or full",
        ("remat.policy=dots", "backend=torch", "topology=cpu-1"),
        mended=("remat.policy=full", "backend=torch", "topology=cpu-1"),
    ),
    BadInput(
        "splash attention on CPUs",
        "kernels.attention", "splash", "is a kernel for TPUs", "topology=cpu-8", "auto or plain",
        ("kernels.attention=splash",), mended=("kernels.attention=auto",),
    ),
    BadInput(
        "splash attention in plain PyTorch",
        "kernels.attention", "splash", "needs the XLA backend", "backend=torch", "auto or plain",
        ("kernels.attention=splash", "backend=torch", "topology=cpu-1"),
        mended=("kernels.attention=plain", "backend=torch", "topology=cpu-1"),
    ),
    BadInput(
        "rows that splash attention does not take",
        "data.seq_len", 200, "must be a multiple of 128", "kernels.attention=splash", "128 or 256",
        ("kernels.attention=splash", "topology=v5e-8", "data.seq_len=200"),
        mended=("kernels.attention=splash", "topology=v5e-8", "data.seq_len=256"),
    ),
    BadInput(
        "tile that does not divide the row",
        "kernels.splash_block_q", 256, "must be a multiple of 128 that divides data.seq_len",
        "data.seq_len=384", "-1 or one of 128, 384",
        ("topology=v5e-8", "data.seq_len=384", "kernels.splash_block_q=256"),
        mended=("topology=v5e-8", "data.seq_len=384", "kernels.splash_block_q=384"),
    ),
    BadInput(
        "part of a tile that does not divide the tile",
        "kernels.splash_block_kv_compute", 384, "that divides kernels.splash_block_kv",
        "kernels.splash_block_kv=256", "-1 or one of 128, 256",
        ("topology=v5e-8", "kernels.splash_block_kv_compute=384"),
        mended=("topology=v5e-8", "kernels.splash_block_kv_compute=256"),
    ),
    BadInput(
        "no checkpoint to take the tokenizer from",
        "model.tokenizer", "pretrained", "needs a checkpoint", "model.pretrained=none", "train",
        ("model.tokenizer=pretrained",), mended=("model.tokenizer=train",),
    ),
    BadInput(
        "new tokenizer for trained weights",
        "model.tokenizer", "train", "new token ids", "model.pretrained=my/model", "pretrained",
        ("model.pretrained=my/model",), mended=("model.pretrained=my/model", "model.tokenizer=pretrained"),
    ),
    BadInput(
        "vocabulary below the bytes",
        "model.config.vocab_size", 200, "too small for a byte-level tokenizer", "256 bytes", "259 or more",
        ("model.config.vocab_size=200",), mended=("model.config.vocab_size=259",),
    ),
    BadInput(
        "unknown builtin data",
        "data.path", "builtin:word_problem", "not a known builtin data set", "builtin:word_problems",
        "'builtin:word_problems'",
        ("data.path=builtin:word_problem",), mended=("data.path=builtin:word_problems",),
    ),
    BadInput(
        "evaluation without records",
        "eval.problems", 9, "needs held-out records", "eval.path=none", "or data.validation=0.02",
        ("eval.problems=9",), mended=("eval.problems=9", "eval.path=test.jsonl"),
    ),
    BadInput(
        "no room for the prompt",
        "eval.max_new_tokens", 512, "must leave room for the prompt", "max_position_embeddings=512",
        "511 or less",
        ("eval.problems=9", "eval.path=test.jsonl", "eval.max_new_tokens=512"),
        mended=("eval.problems=9", "eval.path=test.jsonl", "eval.max_new_tokens=511"),
    ),
    BadInput(
        "resume is neither word nor number",
        "resume", "atuo", "must be one of its choices", "never, auto, or the number of a step", "auto",
        ("resume=atuo",), mended=("resume=auto",),
    ),
    BadInput(
        "best of nothing",
        "save.keep_best", 2, "needs scores to choose by",
        "no evaluation, eval.every_steps=0", "0, or data.validation=0.02 and eval.every_steps=100",
        ("save.keep_best=2",),
        mended=(
            "save.keep_best=2", "data.validation=0.02", "eval.every_steps=100",
            "save.every_steps=100", "schedule.max_steps=400",
        ),
    ),
    BadInput(
        "best of scores before and after training only",
        "save.keep_best", 2, "needs scores to choose by", "eval.every_steps=0", "0, or eval.every_steps=100",
        ("save.keep_best=2", "eval.problems=9", "eval.path=test.jsonl"),
        mended=("eval.problems=9", "eval.path=test.jsonl"),
    ),
    BadInput(
        "scores that meet no save",
        "eval.every_steps", 7, "must be met by saves, or save.keep_best has no steps to choose from",
        "save.every_steps=10: first step of both 70, last step 40", "10",
        (
            "save.keep_best=2", "eval.problems=9", "eval.path=test.jsonl", "eval.every_steps=7",
            "save.every_steps=10",
        ),
        mended=(
            "save.keep_best=2", "eval.problems=9", "eval.path=test.jsonl", "eval.every_steps=10",
            "save.every_steps=10",
        ),
    ),
    BadInput(
        "scores and saves beyond the end",
        "eval.every_steps", 7, "must be met by saves", "first step of both 3500, last step 40",
        "20 for both",
        ("save.keep_best=2", "eval.problems=9", "eval.path=test.jsonl", "eval.every_steps=7"),
        mended=(
            "save.keep_best=2", "eval.problems=9", "eval.path=test.jsonl", "eval.every_steps=20",
            "save.every_steps=20",
        ),
    ),
    BadInput(
        "best of saves by time",
        "eval.every_steps", 7, "must be met by saves", "save.every_steps=0", "save.every_steps=7",
        (
            "save.keep_best=2", "eval.problems=9", "eval.path=test.jsonl", "eval.every_steps=7",
            "save.every_steps=0", "save.every_seconds=60",
        ),
        mended=(
            "save.keep_best=2", "eval.problems=9", "eval.path=test.jsonl", "eval.every_steps=7",
            "save.every_steps=7", "save.every_seconds=60",
        ),
    ),
    BadInput(
        "patience without evaluations during training",
        "eval.patience", 3, "needs scores that get no better", "eval.every_steps=0",
        "0, or eval.every_steps=100",
        ("eval.patience=3", "data.validation=0.02"),
        mended=("eval.patience=3", "data.validation=0.02", "eval.every_steps=100"),
    ),
    BadInput(
        "best by a metric that is not measured",
        "save.best_metric", "token_accuracy", "must be measured", "measured: exact_match",
        "auto, or data.validation=0.02 beside it",
        ("save.best_metric=token_accuracy", "eval.problems=9", "eval.path=test.jsonl"),
        mended=(
            "save.best_metric=token_accuracy", "eval.problems=9", "eval.path=test.jsonl",
            "data.validation=0.02",
        ),
    ),
    BadInput(
        "best of nothing measured",
        "save.best_metric", "exact_match", "must be measured", "measured: nothing",
        "auto, or eval.problems=200 beside it",
        ("save.best_metric=exact_match",),
        mended=("save.best_metric=exact_match", "eval.problems=200", "eval.path=test.jsonl"),
    ),
    BadInput(
        "held-out records named twice",
        "eval.loss_path", "test.jsonl", "one of the two", "data.validation=0.02", "data.validation=0",
        ("eval.loss_path=test.jsonl", "data.validation=0.02"), mended=("eval.loss_path=test.jsonl",),
    ),
    BadInput(
        "unknown builtin held-out data",
        "eval.loss_path", "builtin:problems", "not a known builtin data set", "builtin:word_problems",
        "'builtin:word_problems'",
        ("eval.loss_path=builtin:problems",), mended=("eval.loss_path=builtin:word_problems",),
    ),
    BadInput(
        "all records held out",
        "data.validation", "1", "must be below 1", "must stay under: 1", "0",
        ("data.validation=1",), mended=("data.validation=0",),
    ),
    BadInput(
        "export of a best checkpoint that is not kept",
        "export.step", "best", "needs the best checkpoint to be kept", "save.keep_best=0",
        "last, or save.keep_best=1",
        ("export.step=best", "data.validation=0.02", "eval.every_steps=20"),
        mended=(
            "export.step=best", "data.validation=0.02", "eval.every_steps=20", "save.keep_best=1",
            "save.every_steps=20",
        ),
    ),
    BadInput(
        "requirement of another form",
        "export.require", "exact_match=0.3", "must be a metric, one of >=, <=, > and <, and a number",
        "metrics: exact_match, held_out_loss, token_accuracy", "such as exact_match>=before",
        ("export.require=exact_match=0.3", "eval.problems=9", "eval.path=test.jsonl"),
        mended=("export.require=exact_match>=0.3", "eval.problems=9", "eval.path=test.jsonl"),
    ),
    BadInput(
        "requirement with neither number nor before",
        "export.require", "held_out_loss<=after", "and a number or before", "metrics: exact_match,",
        "such as exact_match>=before",
        ("export.require=held_out_loss<=after", "data.validation=0.02"),
        mended=("export.require=held_out_loss<=before", "data.validation=0.02"),
    ),
    BadInput(
        "requirement of an unknown metric",
        "export.require", "accuracy", "not a known metric", "exact_match, held_out_loss, token_accuracy",
        "'token_accuracy'",
        ("export.require=accuracy>=0.3", "data.validation=0.02"),
        mended=("export.require=token_accuracy>=0.3", "data.validation=0.02"),
    ),
    BadInput(
        "requirement of what is not measured",
        "export.require", "exact_match>=before", "needs its metric to be measured",
        "measured: held_out_loss, token_accuracy", "none, or eval.problems=200 beside it",
        ("export.require=held_out_loss<=before,exact_match>=before", "data.validation=0.02"),
        mended=(
            "export.require=held_out_loss<=before,exact_match>=before", "data.validation=0.02",
            "eval.problems=200",
        ),
    ),
    BadInput(
        "spikes below the median",
        "guards.spike_factor", 0.5, "must be above 1, or half of all steps would be spikes",
        "multiplies the median", "0, or a number such as 5",
        ("guards.spike_factor=0.5",), mended=("guards.spike_factor=5",),
    ),
    BadInput(
        "seconds below 0",
        "save.every_seconds", "-1", "must be at least 0", "smallest: 0", "0 or more",
        ("save.every_seconds=-1",), mended=("save.every_seconds=0",),
    ),
    BadInput(
        "name that is no folder name",
        "name", "my run/1", "usable as the name of a folder", "letters, digits", "my_run_1",
        ("name=my run/1",), mended=("name=my_run_1",),
    ),
    BadInput(
        "float64 on XLA",
        "precision.compute", "float64", "needs the plain PyTorch backend", "backend=xla", "backend=torch",
        ("precision.compute=float64", "precision.master=float64"), problems=2,
        mended=("precision.compute=float64", "precision.master=float64", "backend=torch", "topology=cpu-1"),
    ),
    BadInput(
        "master format wider than compute",
        "precision.master", "float64", "gains nothing over a narrower compute", "precision.compute=bfloat16",
        "precision.compute=float64",
        ("precision.master=float64", "backend=torch", "topology=cpu-1"),
        mended=("precision.master=float64", "precision.compute=float64", "backend=torch", "topology=cpu-1"),
    ),
    BadInput(
        "compute format wider than master",
        "precision.compute", "float64", "gains nothing over narrower stored", "precision.master=float32",
        "precision.master=float64",
        ("precision.compute=float64", "backend=torch", "topology=cpu-1"),
        mended=("precision.compute=float32", "backend=torch", "topology=cpu-1"),
    ),
    BadInput(
        "second moment that bfloat16 cannot follow",
        "optim.beta2", 0.999, "must be at most 0.996 for moments in bfloat16", "optim.moments_dtype=bfloat16",
        "0.996, or optim.moments_dtype=float32",
        ("optim.beta2=0.999", "optim.moments_dtype=bfloat16"),
        mended=("optim.beta2=0.996", "optim.moments_dtype=bfloat16"),
    ),
    BadInput(
        "momentum that bfloat16 cannot follow",
        "optim.momentum", 0.998, "must be at most 0.996 for moments in bfloat16",
        "optim.moments_dtype=bfloat16", "0.996, or optim.moments_dtype=float32",
        ("optim.name=adafactor", "optim.momentum=0.998", "optim.moments_dtype=bfloat16"),
        mended=("optim.name=adafactor", "optim.momentum=0.998"),
    ),
    BadInput(
        "misspelled optimizer",
        "optim.name", "adafacter", "must be one of its choices", "choices: adamw, adafactor", "adafactor",
        ("optim.name=adafacter",), mended=("optim.name=adafactor",),
    ),
    BadInput(
        "rows longer than the model's positions",
        "data.seq_len", 1024, "must not exceed the model's positions", "max_position_embeddings=512",
        "512 or less",
        ("data.seq_len=1024",), mended=("data.seq_len=512",),
    ),
    BadInput(
        "misspelled setting of a source",
        "data.sources.web.pth", "a.jsonl", "not a known setting", "settings of a source: path, subset,",
        "data.sources.web.path (did you mean",
        ("data.sources.web.pth=a.jsonl",), mended=("data.sources.web.path=a.jsonl",),
    ),
    BadInput(
        "setting of the whole given to a source",
        "data.sources.web.seq_len", "64", "not a setting of a source", "settings of a source: path, subset,",
        "data.seq_len, for all sources",
        ("data.sources.web.seq_len=64",), mended=("data.seq_len=64",),
    ),
    BadInput(
        "source as setting",
        "data.sources.web", "a.jsonl", "is a source, not a setting", "settings of a source: path,",
        "data.sources.web.path=",
        ("data.sources.web=a.jsonl",), mended=("data.sources.web.path=a.jsonl",),
    ),
    BadInput(
        "sources as a setting",
        "data.sources", "a.jsonl", "is given by the settings of each source", "sources: none",
        "data.sources.NAME.path=a.jsonl, or none",
        ("data.sources=a.jsonl",), mended=("data.sources=none",),
    ),
    BadInput(
        "source with a name that is none",
        "data.sources.my web", "my web", "must be usable as a part of a setting", "letters, digits, _ and -",
        "my_web",
        ("data.sources.my web.path=a.jsonl",), mended=("data.sources.my_web.path=a.jsonl",),
    ),
    BadInput(
        "weight of zero",
        "data.sources.web.weight", "0", "must be above 0", "must exceed: 0", "a number above 0",
        ("data.sources.web.weight=0",), mended=("data.sources.web.weight=0.1",),
    ),
    BadInput(
        "weight below zero",
        "data.sources.web.weight", "-2", "must be above 0", "must exceed: 0", "a number above 0",
        ("data.sources.web.weight=-2",), mended=("data.sources.web.weight=2",),
    ),
    BadInput(
        "weight that is no number",
        "data.sources.web.weight", "much", "must be a number or none", "type: number or none, above 0",
        "none",
        ("data.sources.web.weight=much",), mended=("data.sources.web.weight=none",),
    ),
    BadInput(
        "unknown preset of a source",
        "data.sources.web.preset", "gms8k", "must be one of its choices", "choices: prompt_completion,",
        "gsm8k",
        ("data.sources.web.preset=gms8k",), mended=("data.sources.web.preset=gsm8k",),
    ),
    BadInput(
        "unknown builtin of a source",
        "data.sources.web.path", "builtin:word_problem", "not a known builtin data set",
        "known: builtin:word_problems", "'builtin:word_problems' (did you mean",
        ("data.sources.web.path=builtin:word_problem",),
        mended=("data.sources.web.path=builtin:word_problems",),
    ),
    BadInput(
        "no weight anywhere",
        "data.sources.code.weight", "none", "is needed for every source", "web: none", "a number above 0",
        ("data.mix=weights", "data.sources.web.path=a.jsonl", "data.sources.code.path=b.jsonl"),
        mended=(
            *("data.mix=weights", "data.sources.web.path=a.jsonl", "data.sources.code.path=b.jsonl"),
            *("data.sources.web.weight=1", "data.sources.code.weight=1"),
        ),
        problems=2,
    ),
    BadInput(
        "one weight missing",
        "data.sources.code.weight", "none", "is needed for every source", "web: 2", "a number above 0",
        ("data.mix=weights", "data.sources.web.weight=2", "data.sources.code.path=b.jsonl"),
        mended=(
            *("data.mix=weights", "data.sources.web.weight=2", "data.sources.code.path=b.jsonl"),
            "data.sources.code.weight=1",
        ),
    ),
    BadInput(
        "weights too far apart",
        "data.sources.web.weight", "1e-05", "must be at least a millionth of the largest", "code: 20",
        "2e-05",
        ("data.mix=weights", "data.sources.web.weight=1e-5", "data.sources.code.weight=20"),
        mended=("data.mix=weights", "data.sources.web.weight=2e-5", "data.sources.code.weight=20"),
    ),
    BadInput(
        "mixing nothing",
        "data.mix", "temperature", "needs sources to mix", "data.sources=none",
        "concat, or data.sources.NAME",
        ("data.mix=temperature",), mended=("data.mix=concat",),
    ),
    BadInput(
        "temperature below one",
        "data.mix_temperature", "0.5", "must be at least 1", "smallest: 1", "1 or more",
        ("data.mix_temperature=0.5",), mended=("data.mix_temperature=1",),
    ),
    BadInput(
        "epochs of sources that begin anew",
        "schedule.epochs", "2", "where each source begins anew when it ends", "data.mix=weights",
        "none with schedule.max_steps=1000, or data.mix=concat",
        (
            *("data.mix=weights", "data.sources.web.weight=2", "data.sources.code.weight=3"),
            *("schedule.epochs=2", "schedule.max_steps=none"),
        ),
        mended=(
            *("data.mix=concat", "data.sources.web.weight=2", "data.sources.code.weight=3"),
            *("schedule.epochs=2", "schedule.max_steps=none"),
        ),
    ),
    BadInput(
        "problems of several sources",
        "eval.problems", 5, "needs held-out records of its own", "eval.path=none", "eval.path=FILE",
        ("eval.problems=5", "data.validation=0.1", "data.sources.web.path=a.jsonl"),
        mended=("eval.problems=5", "eval.path=held.jsonl", "data.sources.web.path=a.jsonl"),
    ),
]  # fmt: skip
